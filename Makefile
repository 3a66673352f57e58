# SPDX-License-Identifier: Apache-2.0
#
#   make demo      the main job, end to end, in about a minute (as root)
#   make test      all the tests (as root; without, the privileged ones are skipped)
#   make test-long the load of 1000 replacements under 1000 connections, whole, in two minutes (as root)
#   make           build/ccload, one static binary
#   make generate  compile the BPF objects again; nothing else needs a compiler for BPF
#   make bench     the benchmarks of docs/performance.md (as root)

CLANG := clang-19

BPF_SOURCES := $(wildcard bpf/*.bpf.c bpf/testdata/*.bpf.c bpf/examples/*.bpf.c registry/*.bpf.c harness/*/*.bpf.c structops/testdata/*.bpf.c cmd/ccload/testdata/*.bpf.c)
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

.PHONY: all build generate check-generated demo test test-long race bench clean
all: build

build:
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o build/ccload ./cmd/ccload

# need PROGRAM,PACKAGE: installs a Debian package if the program is not there, and says so.
need = command -v $(1) >/dev/null || { echo "installing $(2), for $(1)" >&2 && \
	apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends $(2) >/dev/null; }

# Paths and dates of this machine stay out of the objects: the same sources give the same bytes.
generate:
	@$(call need,$(CLANG),$(CLANG))
	@$(call need,$(CLANG:clang%=llvm-strip%),$(CLANG:clang%=llvm%))
	@for c in $(BPF_SOURCES); do \
		echo "$$c" && o=$${c%.c}.o && \
		$(CLANG) -target bpf -mcpu=v3 -g -O2 -Wall -Wextra -Wno-unused-parameter -Werror \
			-fdebug-compilation-dir=. -I bpf -c $$c -o $$o && \
		$(CLANG:clang%=llvm-strip%) -g $$o || exit 1; done

check-generated: generate
	@git diff --exit-code --stat -- '*.bpf.o' && test -z "$$(git status --porcelain -- '*.bpf.o')" || \
		{ echo "the committed BPF objects are not what their sources give: run make generate" >&2; exit 1; }

# Runs the main job; whatever happens, the name is taken out again. On a machine that
# is busy the run's own checks may fail (status 3): it says so, and the picture shows it.
demo: build
	@[ "$$(id -u)" = 0 ] || { echo "make demo registers a congestion control: run it as root" >&2; exit 1; }
	@rm -rf results/demo; set -e; \
	build/ccload register bpf_cubic; \
	trap 'build/ccload unregister bpf_cubic' EXIT; trap 'exit 130' INT TERM; \
	build/ccload run --cc bpf_cubic,cubic --rate 20mbit --rtt 40ms --buffer 1bdp --duration 20s -o results/demo || [ $$? = 3 ]; \
	build/ccload plot results/demo -o results/demo.png

# Privileged tests take turns at the kernel, so packages run one by one. On Debian
# they run in guests with other kernels, too, beside the others, for guests have kernels
# of their own; a release that does not have one of them goes without it. A test program
# may be a guest's init: it is static.
GUESTS := harness/vm internal/vmtest
test: build
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ $(call need,qemu-system-x86_64,qemu-system-x86) } && \
		build/ccload kernels pull $$(build/ccload kernels list | awk 'NR > 1 { print $$1 }') || true; fi
	go vet ./...
	@start=$$(date +%s); export CGO_ENABLED=0; \
	go test -p 1 -count=1 -timeout 60m $(GUESTS:%=./%) & guests=$$!; \
	go test -p 1 -count=1 -timeout 60m $$(go list ./... | grep -vE '$(subst $() ,|,$(GUESTS:%=/%$$))'); status=$$?; \
	wait $$guests || status=1; \
	took=$$(($$(date +%s) - start)); echo "the tests took $$((took / 60)) min $$((took % 60)) s" >&2; exit $$status

test-long:
	CCLOAD_LONG=1 CGO_ENABLED=0 go test -count=1 -v -run 'Load$$' ./registry

race:
	go test -race -p 1 -count=1 -timeout 30m ./cc ./structops ./registry/... ./internal/... ./harness/trace ./plots

# In pairs against a peer in the same run; see docs/performance.md.
bench: build
	@[ "$$(id -u)" = 0 ] || { echo "make bench needs the kernel: run it as root" >&2; exit 1; }
	@$(call need,bpftool,bpftool)
	@$(call need,qemu-system-x86_64,qemu-system-x86)
	build/ccload kernels pull debian-6.12
	go test -run '^$$' -bench 'Register|List' -benchtime 30x ./cmd/ccload
	go test -run '^$$' -bench Sockets -benchtime 11x ./cmd/ccload
	go test -run '^$$' -bench Cost -benchtime 1x ./cmd/ccload
	go test -run '^$$' -bench Group -benchtime 5x ./registry
	go test -run '^$$' -bench Guest -benchtime 3x -timeout 30m ./cmd/ccload
	go test -run '^$$' -bench . -benchtime 3x ./harness/link
	@set -e; build/ccload register bpf_cubic; \
	trap 'build/ccload unregister bpf_cubic' EXIT; trap 'exit 130' INT TERM; \
	CCLOAD_CC=bpf_cubic go test -run '^$$' -bench . -benchtime 3x ./harness

clean:
	rm -rf build results
