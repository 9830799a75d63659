# Two commands for a fresh machine with Python, make and a C++ compiler: `make demo` and `make test`.
# Both set up .venv first: the bindings of llama-cpp-python without its own copy of llama.cpp, then this package.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := $(shell find ggml_patch hylra_gguf cmake -type f -not -path '*/lib/*' -not -name '*.pyc') CMakeLists.txt pyproject.toml README.md

.PHONY: demo test clean

demo: $(VENV)/installed
	$(BIN)/python -m hylra_gguf.demo

# stamps are older than the build they stand for: a source that changes meanwhile is built again
# HYLRA_STOCK_LIB: the unpatched build of the same source, against which the tests compare bit for bit
test: $(VENV)/installed-with-stock
	HYLRA_STOCK_LIB="$$(echo $(CURDIR)/build/*/stock)" $(BIN)/pytest

$(VENV)/bindings:
	$(PYTHON) -m venv $(VENV)
	CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(BIN)/python -m pip install --quiet llama-cpp-python==0.3.36
	touch $@

$(VENV)/installed: $(VENV)/bindings $(SOURCES)
	touch $@.begun
	$(BIN)/python -m pip install --quiet ".[test]"
	mv $@.begun $@

$(VENV)/installed-with-stock: $(VENV)/bindings $(SOURCES)
	touch $@.begun
	$(BIN)/python -m pip install --quiet ".[test]" -C cmake.define.HYLRA_BUILD_STOCK=ON -C "build.targets=hylra;llama-stock"
	mv $@.begun $@
	touch -r $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build
