// shim_atomics.h — atomics, relaxed only as in Metal, and fences. They are real: a word may be shared with another CPU thread, which is
// how a host and a kernel hand something over. (An array of atomics in threadgroup memory is not modelled: declare words and cast.)

namespace metal {
enum memory_order { memory_order_relaxed, memory_order_seq_cst };
enum thread_scope { thread_scope_thread, thread_scope_threadgroup, thread_scope_device, thread_scope_simdgroup };
// Metal 3.2. A fence in a loop is how a thread waits for the host: endless loops are counted there.
MSL_INLINE void atomic_thread_fence(mem_flags, memory_order, thread_scope, MSL_SITE) { msl_fence(site); }
template <class T> struct atomic { static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, float> || is_same_v<T, bool>, "atomic type"); T value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

template <class T> MSL_EXECUTOR_SIDE T msl_atomic_load(T* p) { T r; __atomic_load(p, &r, __ATOMIC_SEQ_CST); return r; }
template <class T> MSL_EXECUTOR_SIDE T msl_atomic_exchange(T* p, T x) { T r; __atomic_exchange(p, &x, &r, __ATOMIC_SEQ_CST); return r; }
template <class T> MSL_EXECUTOR_SIDE bool msl_atomic_swap_if(T* p, T* expected, T x) { return __atomic_compare_exchange(p, expected, &x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); }

#define MSL_ATOMIC_FETCH(SPACE, op, expr)                                                                                         \
  template <class T> MSL_INLINE T atomic_fetch_##op##_explicit(volatile SPACE atomic<T>* p, remove_cv_t<T> x, memory_order, MSL_SITE) { \
    msl_atomic_access((const volatile void*)p, sizeof(T), site);                                                                  \
    T* q = (T*)(void*)&p->value;                                                                                                  \
    T old = msl_atomic_load(q);                                                                                                   \
    while (!msl_atomic_swap_if(q, &old, (T)(expr))) {}                                                                            \
    return old;                                                                                                                   \
  }
#define MSL_ATOMICS(SPACE)                                                                                                        \
  template <class T> MSL_INLINE T atomic_load_explicit(const volatile SPACE atomic<T>* p, memory_order, MSL_SITE) {               \
    msl_atomic_access((const volatile void*)p, sizeof(T), site);                                                                  \
    return msl_atomic_load((T*)(void*)&p->value);                                                                                 \
  }                                                                                                                               \
  template <class T> MSL_INLINE void atomic_store_explicit(volatile SPACE atomic<T>* p, remove_cv_t<T> x, memory_order, MSL_SITE) { \
    msl_atomic_access((const volatile void*)p, sizeof(T), site);                                                                  \
    msl_atomic_exchange((T*)(void*)&p->value, (T)x);                                                                              \
  }                                                                                                                               \
  template <class T> MSL_INLINE T atomic_exchange_explicit(volatile SPACE atomic<T>* p, remove_cv_t<T> x, memory_order, MSL_SITE) { \
    msl_atomic_access((const volatile void*)p, sizeof(T), site);                                                                  \
    return msl_atomic_exchange((T*)(void*)&p->value, (T)x);                                                                       \
  }                                                                                                                               \
  MSL_ATOMIC_FETCH(SPACE, add, old + x) MSL_ATOMIC_FETCH(SPACE, sub, old - x) MSL_ATOMIC_FETCH(SPACE, max, old < x ? x : old)     \
  MSL_ATOMIC_FETCH(SPACE, min, x < old ? x : old) MSL_ATOMIC_FETCH(SPACE, or, old | x) MSL_ATOMIC_FETCH(SPACE, and, old & x)
MSL_ATOMICS(device) MSL_ATOMICS(threadgroup)
template <class T> MSL_INLINE bool is_function_constant_defined(const T& x) { return msl_constant_defined(&x); }
}  // namespace metal
