// handover.metal — what the GPU does between two parts of a step whose sum the host makes (tensor parallel): it gives the numbers
// to the host, waits for what the host makes of them, and goes on. One threadgroup; it waits for the host alone, never for another
// threadgroup, and not for long: where the host does not come, it says so and the rest of the command buffer's waits are skipped.
//
// Numbers and words that the host reads while a command buffer runs must bypass the GPU's caches, in an order: coherent(system)
// and fences of system scope, which Metal has since 3.2 (macOS 15). Before, and where a compiler refuses them, the host finds no
// such kernel and takes another way.
#if __METAL_VERSION__ >= 320
#pragma METAL internals : enable
#ifndef __METAL_MEMORY_SCOPE_SYSTEM__
#define __METAL_MEMORY_SCOPE_SYSTEM__ 3
#endif

constant constexpr metal::thread_scope SYSTEM_SCOPE = static_cast<metal::thread_scope>(__METAL_MEMORY_SCOPE_SYSTEM__);

METAL_FUNC void fence() { atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, SYSTEM_SCOPE); }

// x [n]: the step's own; shared [n]: the host's side; words: CV_WORD_*.
kernel void hand_over(device float* x [[buffer(0)]], volatile coherent(system) device float* shared [[buffer(1)]], volatile coherent(system) device uint* words [[buffer(2)]],
                          constant cv_hand_over_params& p [[buffer(3)]], uint index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  threadgroup uint goes_on;
  if (index == 0) goes_on = words[CV_WORD_GAVE_UP] == 0 ? 1u : 0u;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (goes_on == 0) return;
  for (uint i = index; i < p.n; i += threads) shared[i] = x[i];
  fence();
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
  if (index == 0) {
    words[CV_WORD_ARRIVED] = p.number;
    fence();
    bool released = false;
    for (uint looks = 0; looks < p.patience && !released; looks++) {
      released = int(words[CV_WORD_RELEASED] - p.number) >= 0;
      fence();
    }
    if (!released) words[CV_WORD_GAVE_UP] = p.number;
    fence();
    goes_on = released ? 1u : 0u;
  }
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
  if (goes_on == 0) return;
  for (uint i = index; i < p.n; i += threads) x[i] = shared[i];
}
#endif
