# PVH entry (xen/arch-x86/hvm/start_info.h, docs/misc/pvh): 32-bit protected mode, paging off,
# interrupts off, ebx = physical address of the start info. Turns on SSE (precompiled core uses it),
# write protection, NX and long mode with the first GiB mapped one to one, then calls Rust.

.section .text.entry, "ax", @progbits
.code32
.global pvh_start32
pvh_start32:
    cli
    cld
    mov esp, offset boot_stack_top
    mov esi, ebx                        # the start info's address survives in esi

    # One page directory of 2 MiB pages maps 0 to 1 GiB, writable and executable: for boot only.
    mov eax, offset boot_pdpt + 3       # present, writable
    mov [boot_pml4], eax
    mov eax, offset boot_pd + 3
    mov [boot_pdpt], eax
    mov edi, offset boot_pd
    mov eax, 0x83                       # present, writable, large
    mov ecx, 512
1:  mov [edi], eax
    mov dword ptr [edi + 4], 0
    add eax, 0x200000
    add edi, 8
    loop 1b

    mov eax, cr4
    or eax, 0x620                       # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER
    rdmsr
    or eax, 0x900                       # LME, NXE
    wrmsr
    mov eax, cr0
    and eax, 0xfffffffb                 # EM off: SSE works
    or eax, 0x80010002                  # PG, WP, MP
    mov cr0, eax

    lgdt [boot_gdt_pointer]
    push 8
    mov eax, offset long_mode
    push eax
    retf

.code64
long_mode:
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ss, eax
    mov rsp, offset boot_stack_top
    mov edi, esi                        # first argument; clears the upper half
    xor ebp, ebp
    call rust_entry
    ud2

.section .rodata.boot_gdt, "a", @progbits
.balign 8
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 64-bit code
boot_gdt_pointer:
    .word 15
    .long boot_gdt

# Zeroed by the loader, as all of .bss.
.section .bss.boot_tables, "aw", @nobits
.balign 4096
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
boot_pd:   .skip 4096

# The guard pages below the stacks are left out of the final page tables.
.section .stack, "aw", @nobits
.balign 4096
.global boot_stack_guard
boot_stack_guard: .skip 4096
boot_stack: .skip 65536
.global boot_stack_top
boot_stack_top:
.global trap_stack_guard
trap_stack_guard: .skip 4096
trap_stack: .skip 16384
.global trap_stack_top
trap_stack_top:
