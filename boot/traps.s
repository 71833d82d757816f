# One entry an exception vector. Each brings the stack to error code and vector above the processor's
# frame and goes on in Rust, which reports and ends the domain: nothing ever returns from here.

.macro TRAP vector, has_error
.section .text.trap_entries, "ax", @progbits
.balign 16
trap_entry_\vector:
    .if \has_error == 0
    push 0
    .endif
    push \vector
    jmp trap_common
.section .rodata.trap_table, "a", @progbits
    .quad trap_entry_\vector
.endm

.section .rodata.trap_table, "a", @progbits
.balign 8
.global trap_table
trap_table:
.irp vector, 0,1,2,3,4,5,6,7
    TRAP \vector, 0
.endr
    TRAP 8, 1
    TRAP 9, 0
.irp vector, 10,11,12,13,14
    TRAP \vector, 1
.endr
    TRAP 15, 0
    TRAP 16, 0
    TRAP 17, 1
.irp vector, 18,19,20
    TRAP \vector, 0
.endr
    TRAP 21, 1
.irp vector, 22,23,24,25,26,27,28
    TRAP \vector, 0
.endr
    TRAP 29, 1
    TRAP 30, 1
    TRAP 31, 0

.section .text.trap_entries, "ax", @progbits
trap_common:
    cld
    mov rdi, rsp
    and rsp, -16
    call rust_trap
    ud2
