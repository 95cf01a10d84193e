# The front door: `make demo` and `make test` do everything that they need on a fresh Debian machine with Swift.
CONFIGURATION ?= debug
WIDTH ?= 4
FUZZ_SECONDS ?= 60
SWIFT_SOURCES = Sources Tests Benchmarks Fuzz Package.swift

.PHONY: all setup qemus previous build release package deb install package-test lint fmt test model faults units evacuation realguest web-test matrix nbd-suites demo bench wan soak tsan clean

all: build

setup:
	deploy/setup

# The QEMUs of the field: Debian 12's and Debian 13's.
qemus: setup
	deploy/qemu 7.2
	deploy/qemu 10.0

# The release before this one, with whose agents the tests talk. The first time it costs a build, one to three minutes.
previous: setup
	deploy/previous-release

build: setup
	swift build --product crossdock

release: setup
	swift build -c release --product crossdock

# The Debian package, with the Swift runtime linked in: .build/deb/crossdock_VERSION_ARCHITECTURE.deb.
package: setup
	deploy/package/build

deb: package

# The same files elsewhere: make install PREFIX=/usr/local DESTDIR=... ; units and configuration go below PREFIX/lib and /etc.
PREFIX ?= /usr/local
install: setup
	swift build -c release --static-swift-stdlib --product crossdock --scratch-path .build/package -debug-info-format none -Xlinker -z -Xlinker now
	deploy/package/install .build/package/release/crossdock $(PREFIX) $(DESTDIR)

# The package in fresh Debian systems of two releases; needs root, takes minutes, and longer the first time.
package-test: package
	Tests/Package/roots
	python3 Tests/Package/package.py .build/deb/crossdock_*.deb .cache/package .cache/guest .build/package/release/crossdock
	python3 Tests/Package/getting_started.py docs/getting-started.md .build/deb/crossdock_*.deb .cache/package

lint: setup
	swift format lint --strict --recursive --parallel $(SWIFT_SOURCES)
	python3 -m py_compile deploy/demo/*.py Benchmarks/*.py Tests/EndToEnd/*.py Tests/Faults/*.py Tests/Matrix/*.py Tests/Units/*.py Tests/Evacuation/*.py Tests/RealGuest/*.py Tests/Package/*.py Tests/Suites/*.py Tests/Web/*.py Tests/Suites/programs/server/nbdkit Tests/Suites/programs/server/nbd-server deploy/package/*.py
	gcc -std=gnu11 -Wall -Wextra -Wshadow -Werror -fsyntax-only Benchmarks/Line/line.c Benchmarks/Pauses/writer.c
	sh -n deploy/setup && sh -n Fuzz/run && sh -n docs/model/check && sh -n docs/model/transitions && sh -n Benchmarks/channels && sh -n deploy/guest/build && sh -n deploy/guest/init && sh -n deploy/guest/init-agent && sh -n deploy/guest/init-devices && sh -n deploy/qemu && sh -n deploy/previous-release && sh -n .ci/run && sh -n Tests/Matrix/pairs && sh -n Tests/Units/image && sh -n Tests/Units/initrd && sh -n Tests/RealGuest/image && sh -n Tests/Web/setup && sh -n Tests/Package/roots && sh -n deploy/package/build && sh -n deploy/package/install && sh -n Tests/Suites/sources && sh -n Tests/Suites/in-front && bash -n Tests/Suites/programs/server/qemu-nbd && bash -n Tests/Suites/qemu-without-qtest && sh -n Tests/Suites/programs/client/nbdcopy && sh -n Tests/Suites/programs/client/nbdinfo

fmt:
	swift format --in-place --recursive --parallel $(SWIFT_SOURCES)

# The tests run real guests under emulation: a few at once are as fast as many, and steadier. All with the system's QEMU, then
# what depends on its version with the others.
# What the tests need beside themselves waits for the network and for single processors: all at once.
test: setup
	$(MAKE) -j3 --output-sync=target qemus previous model
	swift build --build-tests
	SWT_EXPERIMENTAL_MAXIMUM_PARALLELIZATION_WIDTH=$(WIDTH) swift test --skip-build --disable-xctest
	WIDTH=$(WIDTH) Tests/Matrix/pairs 7.2:7.2 10.0:10.0 7.2:10.0 10.0:7.2

# Everything for every pair of QEMUs, the newest in Debian unstable included, and the table of docs/versions.md; takes long.
matrix: release qemus
	deploy/qemu newest
	swift build --build-tests
	python3 Tests/Matrix/matrix.py .build/release/crossdock .cache/guest --write docs/versions.md

# The test suites of libnbd, nbdkit, QEMU and nbd, from Debian's sources, with our server and tools in place of theirs, and the counts in
# docs/nbd-conformance.md; takes an hour, and compilers the first time.
nbd-suites: release
	Tests/Suites/sources
	python3 Tests/Suites/suites.py .build/release/crossdock --table docs/nbd-conformance.md

# The rules of ownership, searched exhaustively; each rule taken away must show why it is there.
model: setup
	docs/model/check

# Real migrations, broken at every step; takes long. `make test` runs a few of them.
faults: release
	python3 Tests/Faults/faults.py .build/release/crossdock .cache/guest --json .build/faults.json --markdown .build/faults.md

# The shipped units under a real systemd, in an emulated Debian that is reset in the middle of migrations; takes minutes.
units: release
	Tests/Units/image
	python3 Tests/Units/units.py .build/release/crossdock .cache/units

# Three hosts in namespaces: one is emptied with its coordinator killed in the middle, and everyone comes home; then the coordinator is killed
# before and after each record of its plan. Needs root, takes minutes.
evacuation: release
	python3 Tests/Evacuation/evacuation.py .build/release/crossdock .cache/guest
	python3 Tests/Evacuation/records.py .build/release/crossdock

# A Debian with a database, which clients use over a bridge, there and back, idle and under load: what they see next to what is reported, and
# whether all is in order afterwards. Needs root, takes minutes.
realguest: release
	Tests/RealGuest/image
	python3 Tests/RealGuest/realguest.py .build/release/crossdock .cache/realguest

# The page in a real Chromium, with real agents and guests: moves, an evacuation, trouble, tickets, thieves, 200 viewers, garbage. Chromium is
# large, so deploy/setup leaves it out: Tests/Web/setup installs Debian's where it is missing. Needs root, takes minutes. The pictures of
# docs/web.md: Tests/Web/web.py .build/release/crossdock .cache/guest --screenshots docs/web
web-test: release
	Tests/Web/setup
	python3 Tests/Web/web.py .build/release/crossdock .cache/guest
	python3 Tests/Web/console.py .build/release/crossdock .cache/guest
	python3 Tests/Web/display.py .build/release/crossdock

demo: release
	python3 deploy/demo/demo.py .build/release/crossdock .cache/guest

bench: release
	python3 Benchmarks/mirror.py .build/release/crossdock
	python3 Benchmarks/nbd.py .build/release/crossdock --json .build/nbd-bench.json --markdown .build/nbd-bench.md
	Benchmarks/channels
	python3 Benchmarks/rehearsal.py .build/release/crossdock
	python3 Benchmarks/export.py .build/release/crossdock
	python3 Benchmarks/evacuation.py .build/release/crossdock .cache/guest
	python3 Benchmarks/attack.py .build/release/crossdock
	python3 Benchmarks/viewers.py .build/release/crossdock .cache/guest

# Moves over long lines, and the pause as a distribution, next to QEMU alone; takes hours, goes on where it was interrupted. The section of
# docs/performance.md: python3 Benchmarks/wan.py --write docs/performance.md
wan: release qemus
	python3 Benchmarks/wan.py .build/release/crossdock --resume
	python3 Benchmarks/pauses.py .build/release/crossdock .cache/guest --resume
	python3 Benchmarks/wan.py --table

# What takes too long for every run of the tests: 2^24 records over one session, and the fuzzers.
soak: release
	Benchmarks/channels rekey
	Fuzz/run $(FUZZ_SECONDS)

# -D TSAN lets the sanitizer see the locks; it does not know the standard library's.
tsan: setup
	swift build --build-tests --sanitize=thread -Xswiftc -DTSAN --scratch-path .build/tsan
	TSAN_OPTIONS="suppressions=$(CURDIR)/Tests/tsan.supp" SWT_EXPERIMENTAL_MAXIMUM_PARALLELIZATION_WIDTH=2 \
		.build/tsan/debug/crossdockPackageTests.xctest --testing-library swift-testing --filter 'NBDTests|EventLoopTests|SocketTests'

clean:
	rm -rf .build .cache
