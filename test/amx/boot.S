/* boot.S — the first sector of a disk: loads the rest of it (guest.c, linked to run at 0x10000) and enters it in 64-bit mode with AVX-512's and
 * AMX's registers switched on. CHUNKS: how often 32 KB are read. */
    .set IMAGE, 0x10000
    .set TABLES, 0x1000
    .set STACK, 0x1000000

    .code16
    .globl boot
boot:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    movw $CHUNKS, %bp
read:
    movb $0x42, %ah /* extended read; the BIOS left the drive in dl */
    movw $packet, %si
    int $0x13
    jc stop
    addw $0x800, packet + 6
    addl $64, packet + 8
    decw %bp
    jnz read
    cli /* the BIOS lets interrupts in again */
    inb $0x92, %al
    orb $2, %al
    outb %al, $0x92 /* addresses above 1 MB */
    lgdt gdt_pointer
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmp $8, $protected
stop:
    hlt
    jmp stop

    .code32
protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $TABLES, %edi /* one gigabyte mapped as it is, in pages of 2 MB */
    movl $0x3000 / 4, %ecx
    xorl %eax, %eax
    rep stosl
    movl $TABLES + 0x1003, TABLES
    movl $TABLES + 0x2003, TABLES + 0x1000
    movl $0x83, %eax
    movl $TABLES + 0x2000, %edi
page:
    movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    cmpl $0x40000000, %eax
    jb page
    movl %cr4, %eax
    orl $0x40620, %eax /* PAE, OSFXSR, OSXMMEXCPT, OSXSAVE */
    movl %eax, %cr4
    movl $TABLES, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax /* long mode */
    wrmsr
    movl %cr0, %eax
    andl $~4, %eax
    orl $0x80000002, %eax /* paging; no emulation of floating point */
    movl %eax, %cr0
    ljmp $24, $long

    .code64
long:
    movl $STACK, %esp
    xorl %ecx, %ecx
    xorl %edx, %edx
    movl $0x600e7, %eax /* x87, xmm, ymm, mask and zmm registers, tile shapes and tiles */
    xsetbv
    xorl %ebp, %ebp
    movl $IMAGE, %eax
    call *%rax
    hlt

    .balign 8
gdt:
    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff, 0x00af9a000000ffff
gdt_pointer:
    .word . - gdt - 1
    .long gdt
packet: /* size, sectors, where to (offset, segment), first sector */
    .byte 16, 0
    .word 64, 0, IMAGE / 16
    .quad 1
    .org 510
    .word 0xaa55
