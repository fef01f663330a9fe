# What people run; "make" alone lists it. Each target installs what it needs, and is quiet when nothing is missing.

CARGO ?= cargo
TARGET = $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
# options for the demo, e.g. make demo ARGS="--size 2000"
ARGS ?=

.PHONY: help demo test bench lint

help:
	@echo 'make demo    back up a throwaway cluster, mount the backup, start PostgreSQL on it, copy it out'
	@echo 'make test    all tests, with PostgreSQL 13, 15 and 18'
	@echo 'make bench   benchmarks against pgBackRest and native files'
	@echo 'make lint    formatting, clippy, and licenses where cargo-deny is installed'

demo:
	@scripts/setup.sh --demo
	@$(CARGO) build --release --locked --bin pgcairn
	@$(TARGET)/release/pgcairn demo $(ARGS)

# the programs first: end-to-end tests run them
test:
	@scripts/setup.sh
	@$(CARGO) build --workspace --bins --locked
	@if $(CARGO) nextest --version > /dev/null 2>&1; then \
		$(CARGO) nextest run --workspace --locked; \
	else \
		$(CARGO) test --workspace --locked -- --test-threads=2; \
	fi

bench:
	@scripts/setup.sh --bench
	@$(CARGO) build --release --locked --bin pgcairn
	@benches/run

lint:
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@if $(CARGO) deny --version > /dev/null 2>&1; then $(CARGO) deny --all-features check; fi
