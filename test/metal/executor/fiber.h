// fiber.h — switching between stacks of one OS thread.
#pragma once
#include <stdint.h>
#include <string.h>

// Saves the running stack pointer in *save and continues at `to`.
extern "C" void msl_switch_stack(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type msl_switch_stack,@function
msl_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
// A stack that starts in fn (which never returns) when it is switched to.
static void* new_stack(char* top, void (*fn)()) {
  void** s = (void**)((uintptr_t)top & ~(uintptr_t)15);
  *--s = nullptr;
  *--s = (void*)fn;
  for (int i = 0; i < 6; i++) *--s = nullptr;
  return s;
}
#elif defined(__aarch64__)
asm(R"(
.text
msl_switch_stack:
  sub sp,sp,#176
  stp x19,x20,[sp]
  stp x21,x22,[sp,#16]
  stp x23,x24,[sp,#32]
  stp x25,x26,[sp,#48]
  stp x27,x28,[sp,#64]
  stp x29,x30,[sp,#80]
  stp d8,d9,[sp,#96]
  stp d10,d11,[sp,#112]
  stp d12,d13,[sp,#128]
  stp d14,d15,[sp,#144]
  mov x9,sp
  str x9,[x0]
  mov sp,x1
  ldp x19,x20,[sp]
  ldp x21,x22,[sp,#16]
  ldp x23,x24,[sp,#32]
  ldp x25,x26,[sp,#48]
  ldp x27,x28,[sp,#64]
  ldp x29,x30,[sp,#80]
  ldp d8,d9,[sp,#96]
  ldp d10,d11,[sp,#112]
  ldp d12,d13,[sp,#128]
  ldp d14,d15,[sp,#144]
  add sp,sp,#176
  ret
)");
static void* new_stack(char* top, void (*fn)()) {
  char* s = (char*)((uintptr_t)top & ~(uintptr_t)15) - 176;
  memset(s, 0, 176);
  *(void**)(s + 88) = (void*)fn;
  return s;
}
#endif
