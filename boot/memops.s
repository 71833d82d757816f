# The memory functions the compiler calls. `rep movsb` and `rep stosb`: short, and fast on every
# processor Xen passes devices through on. Named stubdom_*, so that host tests can call them beside
# the C library's; the image gives them their real names.

.section .text.stubdom_memcpy, "ax", @progbits
.global stubdom_memcpy
stubdom_memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret

.section .text.stubdom_memmove, "ax", @progbits
.global stubdom_memmove
stubdom_memmove:
    mov rax, rdi
    mov rcx, rdx
    mov r8, rdi
    sub r8, rsi
    cmp r8, rdx                         # unsigned: below means the ranges overlap from below
    jb 1f
    rep movsb
    ret
1:  lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret

.section .text.stubdom_memset, "ax", @progbits
.global stubdom_memset
stubdom_memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret

.section .text.stubdom_memcmp, "ax", @progbits
.global stubdom_memcmp
stubdom_memcmp:
    xor eax, eax
    mov rcx, rdx
    test rcx, rcx
    jz 1f
    repe cmpsb
    je 1f
    movzx eax, byte ptr [rdi - 1]
    movzx edx, byte ptr [rsi - 1]
    sub eax, edx
1:  ret

.section .text.stubdom_strlen, "ax", @progbits
.global stubdom_strlen
stubdom_strlen:
    xor eax, eax
1:  cmp byte ptr [rdi + rax], 0
    je 2f
    inc rax
    jmp 1b
2:  ret
