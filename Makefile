# SPDX-License-Identifier: Apache-2.0

# The compiler of the BPF objects: another major makes other objects, and with them other costs.
CLANG_MAJOR := 14
CLANG := clang-$(CLANG_MAJOR)
CLANG_FORMAT := clang-format-14

VERSION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
GO_SOURCES := $(shell find . -name '*.go' -not -path './.git/*' -not -name '*_bpfel.go')
C_SOURCES := $(wildcard bpf/*.c bpf/lib/*.h)
GENERATED := $(wildcard bpf/*_bpfel.go bpf/*_bpfel.o docs/generated/* packaging/config.yaml packaging/completions/* packaging/man/*)

# Where build and deb put what they make, and install what is installed. DESTDIR is for who makes packages.
BIN ?= bin
PREFIX ?= /usr/local
export BIN PREFIX DESTDIR

# Packages share the machine's network, cgroups and ports: one after another.
GO_TEST := go test -json -p 1 -count=1
SUMMARY := go run ./internal/testsum

export CGO_ENABLED := 0

.DEFAULT_GOAL := help

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: build
build: ## make bin/bpfnet, a static binary that is the same wherever it is built; needs only Go
	@scripts/deps.sh build
	go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o $(BIN)/bpfnet ./cmd/bpfnet

# What the binary has of others wants their licences with it where it is handed out.
.PHONY: notices
notices: build
	@scripts/notices.sh >$(BIN)/third-party.txt

.PHONY: install
install: build notices ## build, and install for this host below PREFIX=/usr/local: binary, unit, man pages, completions (root)
	@scripts/install.sh install

.PHONY: uninstall
uninstall: ## take away what install has put there (root)
	@scripts/install.sh uninstall

.PHONY: deb
deb: build notices ## make bin/bpfnet_VERSION_ARCH.deb; the same files give the same bytes
	@scripts/deps.sh deb
	@scripts/deb.sh $(VERSION)

.PHONY: bench-build
bench-build: build ## make bin/bpfnet-bench too, which measures; needs only Go
	go build -trimpath -ldflags '-s -w' -o bin/bpfnet-bench ./cmd/bpfnet-bench

.PHONY: run
run: build ## build, then run the daemon in the foreground (ARGS='--docker off ...')
	@exec $(BIN)/bpfnet daemon $(ARGS)

.PHONY: demo
demo: ## show containers talking through bpfnet, in a lab of its own (root, under two minutes)
	@scripts/deps.sh build test
	@go run ./internal/demo

.PHONY: generate
generate: ## compile the BPF programs (clang 14), write docs/generated
	@scripts/deps.sh generate
	@major=$$($(CLANG) -dumpversion 2>/dev/null | cut -d. -f1); [ "$$major" = $(CLANG_MAJOR) ] || { \
		echo "generate: $(CLANG) is of major version $${major:-none}: want clang $(CLANG_MAJOR); apt-get install clang-$(CLANG_MAJOR)" >&2; exit 1; }
	go generate ./bpf
	go test -count=1 ./cmd/bpfnet -run TestReference -update
	go test -count=1 ./metrics -run TestReference -update
	go test -count=1 ./internal/doctest -run 'TestDropReasons|TestMaps' -update

.PHONY: check
check: ## formatting, vet, staticcheck; generated files are those of their sources
	@scripts/deps.sh check generate
	@stray=$$(gofmt -l $(GO_SOURCES)); [ -z "$$stray" ] || { echo "check: not formatted: $$stray; run gofmt -w" >&2; exit 1; }
	go vet ./...
	go tool staticcheck ./...
	$(CLANG_FORMAT) --dry-run -Werror $(C_SOURCES)
	@sums=$$(mktemp) && trap 'rm -f "$$sums"' EXIT && sha256sum $(GENERATED) >"$$sums" && \
		$(MAKE) --no-print-directory generate && { sha256sum --quiet -c "$$sums" 2>/dev/null || { \
		echo "check: the files above were not those of their sources and are made anew; commit them" >&2; exit 1; }; }

.PHONY: test
test: need-root ## install what is missing, check, run all tests at a tenth of the full counts (root, 40 minutes)
	@scripts/deps.sh build test generate check
	@$(MAKE) --no-print-directory check
	@BPFNET_REQUIRE_ROOT=1 $(GO_TEST) -timeout 35m ./... | $(SUMMARY)

.PHONY: test-full
test-full: need-root ## like test, at the full counts (root, 90 minutes)
	@scripts/deps.sh build test generate check
	@$(MAKE) --no-print-directory check
	@BPFNET_REQUIRE_ROOT=1 BPFNET_FULL=1 $(GO_TEST) -timeout 90m ./... | $(SUMMARY)

.PHONY: fuzz
fuzz: need-root ## hold the programs against their model, for FUZZTIME=1h each of frames and of sequences; crashers land in bpf/testdata (root)
	@scripts/deps.sh build test
	@for f in FuzzPacket FuzzSequence; do \
		go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x ./bpf || exit 1; done

FUZZTIME = 1h

.PHONY: test-kernels
test-kernels: need-root ## run the BPF tests and whole hosts on Linux 6.1 and 6.12, emulated (root, 20 minutes)
	@scripts/deps.sh build test
	@BPFNET_REQUIRE_ROOT=1 BPFNET_FULL=1 $(GO_TEST) -timeout 40m ./internal/vm | $(SUMMARY)

.PHONY: kernels-golden
kernels-golden: need-root ## write what the programs cost each kernel, bpf/testdata/kernels, anew (root, two minutes)
	@scripts/deps.sh build test
	go test -count=1 ./bpf -run TestInstructions -update
	go test -count=1 ./internal/vm -run TestOlderKernels -update

.PHONY: conformance
conformance: need-root ## compare with Docker's own data path in every cell, write docs/generated/conformance.md (root, 10 minutes)
	@scripts/deps.sh build test
	@go run ./internal/conformance/cmd

.PHONY: bench
bench: need-root ## measure everything, write docs/performance.md, its plots and the README's figures (root, 40 minutes)
	@scripts/deps.sh build test
	@$(MAKE) --no-print-directory bench-build
	@bin/bpfnet-bench -o bin/full.jsonl
	@$(MAKE) --no-print-directory performance RESULT=bin/full.jsonl

.PHONY: bench-quick
bench-quick: need-root ## measure the traffic that most ask for, and quote the rest from the full result (root, five minutes)
	@scripts/deps.sh build test
	@$(MAKE) --no-print-directory bench-build
	@bin/bpfnet-bench --quick -o bin/quick.jsonl $(addprefix --quote ,$(wildcard $(FULL)))

FULL := docs/performance/full.jsonl
RESULT = $(FULL)

.PHONY: performance
performance: ## write docs/performance.md, its plots and the README's figures from the committed result, or from RESULT=FILE
	@[ -e $(RESULT) ] || { echo "performance: no $(RESULT): make bench measures; or say RESULT=FILE" >&2; exit 1; }
	@go run ./cmd/bpfnet-bench page $(RESULT) docs README.md

SOAK := 20m

.PHONY: soak
soak: need-root ## let everything happen at once for SOAK=20m, write docs/reliability/soak.json (root)
	@scripts/deps.sh build test generate
	@mkdir -p docs/reliability
	@BPFNET_REQUIRE_ROOT=1 go test -count=1 -timeout 0 ./internal/soak -soak $(SOAK) -soak-out $(CURDIR)/docs/reliability/soak.json

.PHONY: reliability
reliability: need-root ## run the tests that keep promises at full counts, write docs/reliability.md (root)
	@scripts/deps.sh build test
	@mkdir -p bin && rm -f bin/promises.jsonl
	@BPFNET_PROMISES=$(CURDIR)/bin/promises.jsonl BPFNET_REQUIRE_ROOT=1 BPFNET_FULL=1 \
		$(GO_TEST) -timeout 90m $$(go run ./internal/promise/cmd tests) | $(SUMMARY)
	@go run ./internal/promise/cmd page bin/promises.jsonl

.PHONY: clean
clean: ## remove what build made
	rm -rf bin

.PHONY: need-root
need-root:
	@[ "$$(id -u)" = 0 ] || { echo "tests make network namespaces and load programs: run make as root" >&2; exit 1; }
