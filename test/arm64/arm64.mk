# arm64.mk — cross-builds for test/arm64/run.sh, from the repository's root: make -f test/arm64/arm64.mk CLANG=… TARGET
# Sources and flags are the Makefile's. CLANG is a clang that knows every target (zig cc), GCC one for arm64 Linux.
include Makefile

ARM64 := build/arm64
ARM64_CC = $(CLANG) -target aarch64-linux-gnu -Wno-unused-command-line-argument
MACOS_CC = $(CLANG) -target aarch64-macos.13.0 -Wno-unused-command-line-argument
ARM64_OBJ := $(NATIVE_SRC:native/%.c=$(ARM64)/obj/%.o)
MACOS_OBJ := $(NATIVE_SRC:native/%.c=$(ARM64)/macos/%.o)
ARM64_TESTS := $(ARM64)/test_kernels $(ARM64)/test_engine $(ARM64)/kernel_set $(ARM64)/exec_emulated.so

# The kernels and their definition alone.
GCC_SRC := $(wildcard native/backend/cpu/arm/*.c) native/backend/cpu/scalar.c native/backend/cpu/pick.c
GCC_OBJ := $(GCC_SRC:native/%.c=$(ARM64)/gcc/%.o)

.PHONY: arm64-linux arm64-macos arm64-gcc
.DELETE_ON_ERROR:
arm64-linux: $(ARM64)/libcaravan.so $(ARM64_TESTS)
arm64-macos: $(ARM64)/macos/libcaravan.dylib
arm64-gcc: $(ARM64)/gcc/test_kernels

$(ARM64)/obj/%.o: native/%.c $(NATIVE_HDR)
	@mkdir -p $(@D)
	@$(ARM64_CC) $(filter-out -g,$(CFLAGS_BASE)) -c $< -o $@

$(ARM64)/libcaravan.so: $(ARM64_OBJ)
	@$(ARM64_CC) -shared -pthread $(ARM64_OBJ) -lm -o $@

$(ARM64)/%: native/test/%.c $(ARM64_OBJ) $(NATIVE_HDR)
	@$(ARM64_CC) $(filter-out -g,$(CFLAGS_BASE)) $< $(ARM64_OBJ) -lm -o $@

$(ARM64)/kernel_set: test/arm64/kernel_set.c $(ARM64_OBJ)
	@$(ARM64_CC) $(filter-out -g,$(CFLAGS_BASE)) $< $(ARM64_OBJ) -lm -o $@

$(ARM64)/exec_emulated.so: test/arm64/exec_emulated.c
	@mkdir -p $(@D)
	@$(ARM64_CC) $(filter-out -g,$(CFLAGS_BASE)) -shared $< -o $@

# For macOS only what a compiler can say: warnings, and that nothing is missing at the link.
$(ARM64)/macos/%.o: native/%.c $(NATIVE_HDR)
	@mkdir -p $(@D)
	@$(MACOS_CC) $(filter-out -g -O3,$(CFLAGS_BASE)) -O1 -c $< -o $@

$(ARM64)/macos/libcaravan.dylib: $(MACOS_OBJ)
	@$(MACOS_CC) -shared -pthread $(MACOS_OBJ) -o $@

$(ARM64)/gcc/%.o: native/%.c $(NATIVE_HDR)
	@mkdir -p $(@D)
	@$(GCC) $(filter-out -g,$(CFLAGS_BASE)) -c $< -o $@

$(ARM64)/gcc/test_kernels: native/test/test_kernels.c $(GCC_OBJ) $(NATIVE_HDR)
	@$(GCC) $(filter-out -g,$(CFLAGS_BASE)) $< $(GCC_OBJ) -lm -o $@
