# ops.mk — programs of the Metal tests, from the repository's root: make -f test/metal/ops/ops.mk
include Makefile
.DEFAULT_GOAL := metal-tests

METAL_OUT := build/metal
FAKE_SRC := $(wildcard test/metal/fake/*.c)
OPS := $(addprefix $(METAL_OUT)/,products_test attention_test shapes_test counts_test fake_test)

.PHONY: metal-tests
metal-tests: $(METAL_OUT)/libfakemetal.so $(OPS)

$(METAL_OUT)/libfakemetal.so: $(FAKE_SRC) $(wildcard test/metal/fake/*.h) test/metal/executor/executor.h
	@mkdir -p $(@D)
	@echo "cc $@"
	@$(CC) -std=gnu11 -O1 -g -Wall -Wextra -Werror -shared -fPIC -fvisibility=hidden -pthread $(FAKE_SRC) -ldl -o $@

$(METAL_OUT)/%: test/metal/ops/%.c test/metal/ops/ops.h $(NATIVE_OBJ) $(NATIVE_HDR)
	@mkdir -p $(@D)
	@echo "cc $@"
	@$(CC) $(CFLAGS_BASE) $(CFLAGS) $< $(NATIVE_OBJ) -lm -ldl -o $@
