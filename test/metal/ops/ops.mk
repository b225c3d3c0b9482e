# ops.mk — programs of the Metal tests, from the repository's root: make -f test/metal/ops/ops.mk
include Makefile
.DEFAULT_GOAL := metal-tests

METAL_OUT := build/metal
FAKE_SRC := $(wildcard test/metal/fake/*.c)
OPS := $(addprefix $(METAL_OUT)/,products_test attention_test shapes_test counts_test fake_test hand_over_test archive_test)

.PHONY: metal-tests
metal-tests: $(METAL_OUT)/libfakemetal.so $(OPS) metal-tsan

$(METAL_OUT)/libfakemetal.so: $(FAKE_SRC) $(wildcard test/metal/fake/*.h) test/metal/executor/executor.h
	@mkdir -p $(@D)
	@echo "cc $@"
	@$(CC) -std=gnu11 -O1 -g -Wall -Wextra -Werror -shared -fPIC -fvisibility=hidden -pthread $(FAKE_SRC) -ldl -o $@

$(METAL_OUT)/%: test/metal/ops/%.c test/metal/ops/ops.h test/metal/ops/reference.h $(NATIVE_OBJ) $(NATIVE_HDR)
	@mkdir -p $(@D)
	@echo "cc $@"
	@$(CC) $(CFLAGS_BASE) $(CFLAGS) $< $(NATIVE_OBJ) -lm -ldl -o $@

# Host and fake GPU under ThreadSanitizer: the two run at the same time and share words.
TSAN := -O1 -g -w -fsanitize=thread -pthread
TSAN_SRC := $(addprefix native/backend/metal/,device.c memory.c pipelines.c commands.c archive.c hand_over.c hand_over_watch.c hand_over_ways.c kernel_source.c objc.c) native/engine/error.c

.PHONY: metal-tsan
metal-tsan: $(METAL_OUT)/tsan/libfakemetal.so $(METAL_OUT)/tsan/hand_over_test

$(METAL_OUT)/tsan/libfakemetal.so: $(FAKE_SRC) $(wildcard test/metal/fake/*.h) test/metal/executor/executor.h
	@mkdir -p $(@D)
	@echo "cc $@"
	@$(CC) -std=gnu11 $(TSAN) -shared -fPIC -fvisibility=hidden $(FAKE_SRC) -ldl -o $@

$(METAL_OUT)/tsan/hand_over_test: test/metal/ops/hand_over_test.c $(TSAN_SRC) $(NATIVE_HDR)
	@mkdir -p $(@D)
	@echo "cc $@"
	@$(CC) -std=c11 -D_GNU_SOURCE $(TSAN) $< $(TSAN_SRC) -lm -ldl -o $@
