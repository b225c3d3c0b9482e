// shim_arguments.h — kernel arguments: each converts to whatever the kernel's parameter is. Used by the calls that the rewriter
// (compiler/rewrite.ts) appends to a kernel file.

struct msl_arg_pointer_read {
  int index;
  template <class T> operator device const T*() const { return (device const T*)msl_buffer(index); }
  template <class T> operator constant T*() const { return (constant T*)msl_buffer(index); }
};
struct msl_arg_pointer_write {
  int index;
  template <class T> operator device T*() const { return (device T*)msl_buffer(index); }
};
struct msl_arg_reference_read {
  int index;
  template <class T> operator constant T&() const { return *(constant T*)msl_buffer(index); }
  template <class T> operator device const T&() const { return *(device const T*)msl_buffer(index); }
};
struct msl_arg_reference_write {
  int index;
  template <class T> operator device T&() const { return *(device T*)msl_buffer(index); }
};
struct msl_arg_threadgroup {
  int index;
  template <class T> operator threadgroup T*() const { return (threadgroup T*)msl_threadgroup_buffer(index); }
};
struct msl_arg_index3 {
  const unsigned* p;
  operator uint() const { return p[0]; }
  operator ushort() const { return (ushort)p[0]; }
  operator uint2() const { return uint2{p[0], p[1]}; }
  operator uint3() const { return uint3{p[0], p[1], p[2]}; }
  operator ushort2() const { return ushort2{(ushort)p[0], (ushort)p[1]}; }
  operator ushort3() const { return ushort3{(ushort)p[0], (ushort)p[1], (ushort)p[2]}; }
};
struct msl_arg_index1 {
  unsigned value;
  operator uint() const { return value; }
  operator ushort() const { return (ushort)value; }
};
struct msl_kernel_entry {
  msl_kernel_entry(const char* name, const char* arguments, void (*fn)(const msl_position*), unsigned written) { msl_register_kernel(name, arguments, fn, written); }
};
struct msl_constant_entry {
  msl_constant_entry(int index, const char* name, void* p, unsigned size) { msl_register_constant(index, name, p, size); }
};
