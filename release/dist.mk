# dist.mk — the executables that are given away, built on Linux for every system: make -f release/dist.mk (or `make dist`).
# The C library is cross-compiled by zig's clang, Bun puts it into its own executable of the target. All tools come from package
# registries by version and hash (zig.txt, bun.lock) into .tools/release, so a clean clone gives the same bytes:
# dist/SHA256SUMS. Nothing of Apple's is needed: Metal and IOKit are loaded at run time.
include Makefile
.DEFAULT_GOAL := release

RELEASE_TOOLS := .tools/release
RELEASE_OUT := build/release
RELEASE_BUNS := $(RELEASE_TOOLS)/bun/.installed
ZIG_EXE := $(RELEASE_TOOLS)/zig/ziglang/zig
RELEASE_CC = ZIG_GLOBAL_CACHE_DIR=$(CURDIR)/$(RELEASE_TOOLS)/zig-cache ZIG_LOCAL_CACHE_DIR=$(CURDIR)/$(RELEASE_TOOLS)/zig-cache $(ZIG_EXE) cc
RELEASES := dist/caravan-darwin-arm64 dist/caravan-linux-x64 dist/caravan-linux-arm64

# Oldest systems: macOS 13, and Linux with glibc 2.28 (Debian 10, RHEL 8).
darwin-arm64_TARGET := aarch64-macos.13.0
linux-x64_TARGET := x86_64-linux-gnu.2.28
linux-arm64_TARGET := aarch64-linux-gnu.2.28
darwin-arm64_BUN := bun-darwin-aarch64
linux-x64_BUN := bun-linux-x64
linux-arm64_BUN := bun-linux-aarch64
darwin-arm64_LIB := libcaravan.dylib
linux-x64_LIB := libcaravan.so
linux-arm64_LIB := libcaravan.so
darwin-arm64_LINK := -dynamiclib -Wl,-install_name,@rpath/libcaravan.dylib
linux-x64_LINK := -shared -Wl,-soname,libcaravan.so -Wl,--build-id=none -lm -s
linux-arm64_LINK := $(linux-x64_LINK)

.PHONY: release release-tools
release: dist/SHA256SUMS
release-tools: $(ZIG_EXE) $(RELEASE_BUNS)

# pip checks the hashes of zig.txt, Bun those of bun.lock.
$(ZIG_EXE): release/zig.txt
	@echo "== getting zig's clang from PyPI"
	@rm -rf $(RELEASE_TOOLS)/zig && python3 -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target $(RELEASE_TOOLS)/zig -r release/zig.txt
	@touch $@

$(RELEASE_BUNS): release/package.json release/bun.lock | $(filter .tools/%,$(BUN))
	@echo "== getting Bun for each system from npm"
	@mkdir -p $(@D) && cp release/package.json release/bun.lock $(@D) && cd $(@D) && $(abspath $(shell command -v $(BUN))) install --silent --frozen-lockfile --os='*' --cpu='*'
	@touch $@

# rules SYSTEM: objects, library and executable of a target.
define rules
$(RELEASE_OUT)/$(1)/%.o: native/%.c $$(NATIVE_HDR) | $$(ZIG_EXE)
	@mkdir -p $$(@D)
	@$$(RELEASE_CC) -target $$($(1)_TARGET) -Wno-unused-command-line-argument -g0 $$(filter-out -g,$$(CFLAGS_BASE)) -c $$< -o $$@

$(RELEASE_OUT)/$(1)/$$($(1)_LIB): $$(NATIVE_SRC:native/%.c=$(RELEASE_OUT)/$(1)/%.o)
	@echo "ld $$@"
	@$$(RELEASE_CC) -target $$($(1)_TARGET) -pthread $$^ $$($(1)_LINK) -o $$@

dist/caravan-$(1): $(RELEASE_OUT)/$(1)/$$($(1)_LIB) $$(TS_SRC) node_modules/.installed $$(RELEASE_BUNS)
	@mkdir -p $$(@D)
	$$(BUN) build --compile --no-compile-autoload-dotenv --no-compile-autoload-bunfig --minify-syntax --minify-whitespace --target=$$(subst aarch64,arm64,$$($(1)_BUN)) \
	  --compile-executable-path=$$(RELEASE_TOOLS)/bun/node_modules/@oven/$$($(1)_BUN)/bin/bun --root src src/main.ts src/chat/text-worker.ts $$< --outfile $$@
endef
$(foreach system,darwin-arm64 linux-x64 linux-arm64,$(eval $(call rules,$(system))))

dist/SHA256SUMS: $(RELEASES)
	@cd dist && sha256sum $(notdir $(RELEASES)) > $(@F).tmp && mv $(@F).tmp $(@F) && cat $(@F)
