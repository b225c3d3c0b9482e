# metal.mk — included by the Makefile: the Metal backend's sources, and its kernels as C text. The kernels are compiled by the
# Mac that runs them, so any machine can build the library.

METAL_KERNEL_DIR := native/backend/metal/kernels
METAL_FAMILIES := matvec matmul experts rows attention head handover
METAL_TEXT := build/gen/metal_kernels.h

NATIVE_SRC += $(wildcard native/backend/metal/*.c)
NATIVE_HDR += $(METAL_TEXT)

# A string for each file, a line a line; kernel_source.c puts params and prelude before each family.
metal_string = echo "static const char $(1)_text[] ="; sed -e '/^\#include "/d' -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/^/"/' -e 's/$$/\\n"/' $(2); echo ';'

$(METAL_TEXT): $(wildcard $(METAL_KERNEL_DIR)/*) native/backend/metal/metal.mk
	@mkdir -p $(@D)
	@echo "gen $@"
	@{ echo '/* Made from native/backend/metal/kernels by metal.mk. */'; \
	  $(call metal_string,params,$(METAL_KERNEL_DIR)/params.h); \
	  $(call metal_string,prelude,$(METAL_KERNEL_DIR)/prelude.metal); \
	  $(foreach f,$(METAL_FAMILIES),$(call metal_string,$(f),$(METAL_KERNEL_DIR)/$(f).metal);) } > $@.tmp && mv $@.tmp $@
