// The targets: what was promised, and which figure of which benchmark says whether
// it holds. Figures are ratios within one run, CPU, or counts wherever they can be;
// the few times among them are of single operations on one machine.

package main

import "slices"

// source is what has to be run: benchmarks of one package, or a test that prints its
// figures in the form of benchmarks.
type source struct {
	pkg   string // folder in the repository
	bench string // for -bench
	test  string // for -run
	// times is for -benchtime. Empty: Go's own second.
	times string
	env   []string
	once  bool // it takes minutes: once, whatever -count says
	// fleet: it is measured by make scale, which takes long, and what that left in
	// integration/scale/results is taken unless the target is asked for by name.
	fleet bool
	// peers are the variables that name programs without which it cannot run.
	peers []string
}

// SPIRE is measured where the environment names its two programs, by a Go module of its
// own, which has SPIRE's API.
const spireModule = "integration/bench/spire"

var spire = []string{"MERLON_BENCH_SPIRE_SERVER", "MERLON_BENCH_SPIRE_AGENT"}

var (
	sign        = source{pkg: "ca", bench: "^BenchmarkSign$", times: "50x"}
	propagation = source{pkg: "integration/bench", bench: "^BenchmarkRegistrationReachesWorkload$", times: "100x", once: true}
	cuts        = source{pkg: "integration/bench", bench: "^(BenchmarkPolicyReachesCall|BenchmarkRevocationCutsConnection)$", times: "100x", once: true}
	fleet       = source{
		pkg: "integration/scale", test: "^TestScale$", once: true, fleet: true,
		env: []string{"MERLON_SCALE_AGENTS=10000", "MERLON_SCALE_ENTRIES=1000000"},
	}
	workloadAPI = source{pkg: "integration/bench", bench: "^BenchmarkFirstAnswer$", times: "20x"}
	decisions   = source{pkg: "policy/engine", bench: "^(BenchmarkAuthorize|BenchmarkKept)$"}
	recorded    = source{pkg: "sdk", bench: "^BenchmarkDecideHere$"}
	extAuthz    = source{pkg: "integration/bench", bench: "^BenchmarkCheck$", times: "20x"}
	unary       = source{pkg: "integration/bench", bench: "^BenchmarkUnaryCall$", times: "20x"}
	handshake   = source{pkg: "integration/bench", bench: "^(BenchmarkHandshake|BenchmarkNewHandshake)$", times: "10x"}
	pairs       = source{pkg: "integration/bench", bench: "^BenchmarkSidecarPair$/^(http|grpc|tcp)$/^(100|16)-bytes$/^at-once=16$", times: "8x"}
	idlePair    = source{pkg: "integration/bench", bench: "^BenchmarkSidecarConnections$/^http$/^inbound$", times: "1x", once: true}
	size        = source{pkg: "sdk", test: "^TestTheSDKAddsLittleToAProgram$", once: true}
	cutoff      = source{pkg: "sdk", test: "^TestRevocationEndsEveryStream$", env: []string{"MERLON_STREAMS=10000"}}
	rotation    = source{
		pkg: "integration", test: "^TestRootRotatesUnderHandshakes$", once: true,
		env: []string{"ROTATIONS=4", "HANDSHAKES=500", "WORKLOADS=200"},
	}
	spireEntry    = source{pkg: spireModule, bench: "^BenchmarkEntryReachesWorkload$", times: "10x", once: true, peers: spire}
	spireAnswer   = source{pkg: spireModule, bench: "^BenchmarkFirstAnswer$", times: "10x", once: true, peers: spire}
	spireIssue    = source{pkg: spireModule, bench: "^BenchmarkIssue$", times: "20x", peers: spire}
	spireRegister = source{pkg: spireModule, bench: "^BenchmarkRegister$", times: "5x", peers: spire}

	register = source{pkg: "ca", bench: "^BenchmarkCreateEntry$", times: "200x"}
	store    = source{pkg: "ca/internal/store/badger", bench: "^BenchmarkTxn$/^writers=64$", times: "50000x"}
)

// target is one line of the table.
type target struct {
	p, what string
	source  source
	// bench is the benchmark as its line names it, without "Benchmark" and the number
	// of processors; unit is the figure; over, if set, is what it is divided by.
	bench, unit, over string
	// scale is what the figure is multiplied by (0: 1), for the unit in which it is shown.
	scale float64
	shown string
	// most and least are the target; a bound of 0 with least is none.
	most, least float64
	// open: nothing was promised; the figure is there to be known.
	open bool
	// stretch: the target is more than was promised.
	stretch bool
	// peer is the variable that names the program with which is compared, if that is
	// not of Debian or a Go module.
	peer string
}

var targets = []target{
	{p: "P1", what: "X509-SVID through the whole CA, batch of 100 : CSR check and CreateCertificate", source: sign, bench: "Sign", unit: "ca-ratio", shown: "×", most: 1.2},
	{p: "P1", what: "the same", source: sign, bench: "Sign", unit: "ca-ratio", shown: "×", most: 0.8, stretch: true},
	{p: "P1", what: "CPU of the server per X509-SVID, calls for 100 : SPIRE's server", source: spireIssue, bench: "Issue", unit: "merlon-own-µs", over: "spire-own-µs", shown: "×", most: 1, stretch: true},
	{p: "P2", what: "entry created → SVID at the workload, p50", source: propagation, bench: "RegistrationReachesWorkload/entries=0", unit: "created-p50-ms", shown: "ms", most: 20},
	{p: "P2", what: "the same, p99", source: propagation, bench: "RegistrationReachesWorkload/entries=0", unit: "created-p99-ms", shown: "ms", most: 200},
	{p: "P2", what: "the same beside 100 000 entries, p50", source: propagation, bench: "RegistrationReachesWorkload/entries=100000", unit: "created-p50-ms", shown: "ms", most: 20},
	{p: "P2", what: "the same, p99", source: propagation, bench: "RegistrationReachesWorkload/entries=100000", unit: "created-p99-ms", shown: "ms", most: 200},
	{p: "P2", what: "entry deleted → SVID off the stream, p50", source: propagation, bench: "RegistrationReachesWorkload/entries=0", unit: "deleted-p50-ms", shown: "ms", most: 20},
	{p: "P2", what: "the same, p99", source: propagation, bench: "RegistrationReachesWorkload/entries=0", unit: "deleted-p99-ms", shown: "ms", most: 200},
	{p: "P2", what: "the same beside 100 000 entries, p50", source: propagation, bench: "RegistrationReachesWorkload/entries=100000", unit: "deleted-p50-ms", shown: "ms", most: 20},
	{p: "P2", what: "the same, p99", source: propagation, bench: "RegistrationReachesWorkload/entries=100000", unit: "deleted-p99-ms", shown: "ms", most: 200},
	{p: "P2", what: "revocation → live connection cut, p50", source: cuts, bench: "RevocationCutsConnection/entries=0", unit: "cut-p50-ms", shown: "ms", most: 20},
	{p: "P2", what: "the same, p99", source: cuts, bench: "RevocationCutsConnection/entries=0", unit: "cut-p99-ms", shown: "ms", most: 200},
	{p: "P2", what: "the same beside 100 000 entries, p50", source: cuts, bench: "RevocationCutsConnection/entries=100000", unit: "cut-p50-ms", shown: "ms", most: 20},
	{p: "P2", what: "the same, p99", source: cuts, bench: "RevocationCutsConnection/entries=100000", unit: "cut-p99-ms", shown: "ms", most: 200},
	{p: "P2", what: "policy pushed → next call decided by it, p50", source: cuts, bench: "PolicyReachesCall/entries=0/grants", unit: "decided-p50-ms", shown: "ms", most: 20},
	{p: "P2", what: "the same, p99", source: cuts, bench: "PolicyReachesCall/entries=0/grants", unit: "decided-p99-ms", shown: "ms", most: 200},
	{p: "P2", what: "the same beside 100 000 entries, p50", source: cuts, bench: "PolicyReachesCall/entries=100000/grants", unit: "decided-p50-ms", shown: "ms", most: 20},
	{p: "P2", what: "the same, p99", source: cuts, bench: "PolicyReachesCall/entries=100000/grants", unit: "decided-p99-ms", shown: "ms", most: 200},
	{p: "P2", what: "the same policy with Rego of its own, p50", source: cuts, bench: "PolicyReachesCall/entries=0/ownrego", unit: "decided-p50-ms", shown: "ms", most: 20},
	{p: "P2", what: "the same, p99", source: cuts, bench: "PolicyReachesCall/entries=0/ownrego", unit: "decided-p99-ms", shown: "ms", most: 200},
	{p: "P2", what: "the same beside 100 000 entries, p50", source: cuts, bench: "PolicyReachesCall/entries=100000/ownrego", unit: "decided-p50-ms", shown: "ms", most: 20},
	{p: "P2", what: "the same, p99", source: cuts, bench: "PolicyReachesCall/entries=100000/ownrego", unit: "decided-p99-ms", shown: "ms", most: 200},
	{p: "P2", what: "entry created → SVID at the workload, p50 : SPIRE, which asks every 5 s", source: spireEntry, bench: "EntryReachesWorkload", unit: "merlon-p50-ms", over: "spire-p50-ms", shown: "×", most: 1, stretch: true},
	{p: "P2", what: "the same, the longest", source: spireEntry, bench: "EntryReachesWorkload", unit: "merlon-max-ms", over: "spire-max-ms", shown: "×", most: 1, stretch: true},
	{p: "P3", what: "CA with 1 M entries and 10 000 agents, at rest", source: fleet, bench: "Fleet", unit: "idle-%core", shown: "% of a core", most: 2},
	{p: "P3", what: "the same, memory", source: fleet, bench: "Fleet", unit: "idle-MiB", shown: "MiB", most: 2560},
	{p: "P3", what: "memory for each entry (100 agents, 1 M entries less 10 000)", source: fleet, bench: "Fleet", unit: "entry-kB", shown: "kB", most: 1.3},
	{p: "P3", what: "memory for each agent (1 M entries, 10 000 agents less 100)", source: fleet, bench: "Fleet", unit: "agent-kB", shown: "kB", most: 80},
	{p: "P3", what: "1 M entries: start to serving", source: fleet, bench: "Fleet", unit: "start-s", shown: "s", most: 5},
	{p: "P3", what: "one change, 10 000 agents, CPU of the CA: with 1 M entries : with 10 000 (O(1))", source: fleet, bench: "Fleet", unit: "change-cpu-µs", over: "change-of-few-cpu-µs", shown: "×", most: 2},
	{p: "P3", what: "memory of the server without entries : SPIRE's", source: spireAnswer, bench: "FirstAnswer", unit: "merlon-server-idle-MiB", over: "spire-server-idle-MiB", shown: "×", most: 1, stretch: true},
	{p: "P3", what: "the same with 1 000 entries", source: spireAnswer, bench: "FirstAnswer", unit: "merlon-server-loaded-MiB", over: "spire-server-loaded-MiB", shown: "×", most: 1, stretch: true},
	{p: "P3", what: "server and agent with 1 000 entries, at rest : SPIRE's", source: spireAnswer, bench: "FirstAnswer", unit: "merlon-rest-%core", over: "spire-rest-%core", shown: "×", most: 1, stretch: true},
	{p: "P4", what: "10 000 agents, all streams cut → all in sync", source: fleet, bench: "Fleet", unit: "cut-synced-s", shown: "s", most: 60},
	{p: "P4", what: "the same, the CA killed", source: fleet, bench: "Fleet", unit: "killed-synced-s", shown: "s", most: 60},
	{p: "P5", what: "FetchX509SVID, first answer, warm, 32 callers, 1 000 entries, both ends", source: workloadAPI, bench: "FirstAnswer", unit: "both-ends-svid-µs", shown: "µs", most: 250},
	{p: "P5", what: "the same : a stream on the socket that does nothing", source: workloadAPI, bench: "FirstAnswer", unit: "both-ends-ratio", shown: "×", most: 2},
	{p: "P5", what: "the agent's CPU for it : SPIRE's agent", source: spireAnswer, bench: "FirstAnswer", unit: "merlon-own-µs", over: "spire-own-µs", shown: "×", most: 1, stretch: true},
	{p: "P5", what: "memory of the agent without entries : SPIRE's", source: spireAnswer, bench: "FirstAnswer", unit: "merlon-agent-idle-MiB", over: "spire-agent-idle-MiB", shown: "×", most: 1, stretch: true},
	{p: "P5", what: "the same with 1 000 entries, after the answers", source: spireAnswer, bench: "FirstAnswer", unit: "merlon-agent-loaded-MiB", over: "spire-agent-loaded-MiB", shown: "×", most: 1, stretch: true},
	{p: "P6", what: "decision, 10 000 grants, compiled", source: decisions, bench: "Authorize/grants=10000/allow/program", unit: "cpu-ns/op", shown: "ns", most: 100},
	{p: "P6", what: "the same, allocations", source: decisions, bench: "Authorize/grants=10000/allow/program", unit: "allocs/op", shown: "", most: 0},
	{p: "P6", what: "kept answer of OPA", source: decisions, bench: "Kept", unit: "cpu-ns/op", shown: "ns", most: 150},
	{p: "P6", what: "the same, allocations", source: decisions, bench: "Kept", unit: "allocs/op", shown: "", most: 0},
	{p: "P6", what: "evaluated by OPA", source: decisions, bench: "Authorize/grants=10000/allow/opa", unit: "cpu-ns/op", scale: 1e-3, shown: "µs", most: 30},
	{p: "P6", what: "the same, allocations", source: decisions, bench: "Authorize/grants=10000/allow/opa", unit: "allocs/op", shown: "", most: 130},
	{p: "P6", what: "decision with its record in the SDK", source: recorded, bench: "DecideHere/allow", unit: "cpu-ns/op", shown: "ns", most: 300},
	{p: "P6", what: "the same, allocations", source: recorded, bench: "DecideHere/allow", unit: "allocs/op", shown: "", most: 0},
	{p: "P6", what: "decision for an Envoy (ext_authz) : opa-envoy-plugin's", source: extAuthz, bench: "Check", unit: "agent-own-µs", over: "opa-envoy-own-µs", shown: "×", most: 1, stretch: true, peer: "MERLON_BENCH_OPA_ENVOY"},
	{p: "P7", what: "gRPC unary call, 16 at a time, with decision and record : go-spiffe's mTLS alone", source: unary, bench: "UnaryCall", unit: "sdk-ratio", shown: "×", most: 1.10},
	{p: "P7", what: "the same : plaintext", source: unary, bench: "UnaryCall", unit: "sdk-cpu-µs", over: "plain-cpu-µs", shown: "×", most: 1.35},
	{p: "P8", what: "handshake, chains seen before, X25519MLKEM768 : go-spiffe", source: handshake, bench: "Handshake/mlkem", unit: "sdk-ratio", shown: "×", most: 0.85},
	{p: "P8", what: "the same with X25519", source: handshake, bench: "Handshake/x25519", unit: "sdk-ratio", shown: "×", most: 0.65},
	{p: "P8", what: "chains not seen before", source: handshake, bench: "NewHandshake", unit: "sdk-ratio", shown: "×", most: 1},
	{p: "P8", what: "100 roots : one root", source: handshake, bench: "NewHandshake", unit: "sdk-100-roots-cpu-µs", over: "sdk-cpu-µs", shown: "×", most: 1.1},
	{p: "P9", what: "sidecar pair, tcp, 16 at a time, CPU of both processes : ghostunnel pair", source: pairs, bench: "SidecarPair/tcp/100-bytes/at-once=16", unit: "sidecar-own-µs", over: "ghostunnel-own-µs", shown: "×", most: 1.1, peer: "MERLON_BENCH_GHOSTUNNEL"},
	{p: "P9", what: "the same : HAProxy pair", source: pairs, bench: "SidecarPair/tcp/100-bytes/at-once=16", unit: "sidecar-own-µs", over: "haproxy-own-µs", shown: "×", most: 1.25},
	{p: "P9", what: "the same : nginx pair", source: pairs, bench: "SidecarPair/tcp/100-bytes/at-once=16", unit: "sidecar-own-µs", over: "nginx-own-µs", shown: "×", open: true},
	{p: "P9", what: "memory of a sidecar, idle", source: idlePair, bench: "SidecarConnections/http/inbound", unit: "MiB-idle", shown: "MiB", most: 20},
	{p: "P10", what: "sidecar pair, HTTP/1.1, a decision per request, 16 at a time : ReverseProxy pair", source: pairs, bench: "SidecarPair/http/100-bytes/at-once=16", unit: "sidecar-own-µs", over: "reverseproxy-own-µs", shown: "×", most: 0.5},
	{p: "P10", what: "the same : HAProxy pair, without decisions", source: pairs, bench: "SidecarPair/http/100-bytes/at-once=16", unit: "sidecar-own-µs", over: "haproxy-own-µs", shown: "×", most: 1.8, stretch: true},
	{p: "P10", what: "the same : nginx pair, without decisions", source: pairs, bench: "SidecarPair/http/100-bytes/at-once=16", unit: "sidecar-own-µs", over: "nginx-own-µs", shown: "×", open: true},
	{p: "P10", what: "sidecar pair, gRPC, a decision per call, 16 at a time : ReverseProxy pair", source: pairs, bench: "SidecarPair/grpc/16-bytes/at-once=16", unit: "sidecar-own-µs", over: "reverseproxy-own-µs", shown: "×", most: 0.4},
	{p: "P10", what: "the same : HAProxy pair, without decisions", source: pairs, bench: "SidecarPair/grpc/16-bytes/at-once=16", unit: "sidecar-own-µs", over: "haproxy-own-µs", shown: "×", most: 1.8, stretch: true},
	{p: "P10", what: "the same : nginx pair, without decisions", source: pairs, bench: "SidecarPair/grpc/16-bytes/at-once=16", unit: "sidecar-own-µs", over: "nginx-own-µs", shown: "×", open: true},
	{p: "P11", what: "hello-world server with the SDK, more than go-spiffe's", source: size, bench: "ProgramSize", unit: "more-bytes", scale: 1e-6, shown: "MB", most: 3},
	{p: "P12", what: "last byte on 10 000 live streams after the revocation, p99", source: cutoff, bench: "Cutoff/streams=10000", unit: "last-byte-p99-ms", scale: 1e-3, shown: "s", most: 1},
	{p: "P13", what: "root replaced under handshakes and requests: failed", source: rotation, bench: "RootRotation", unit: "failed", shown: "", most: 0},
	{p: "P13", what: "the same, handshakes a second", source: rotation, bench: "RootRotation", unit: "handshakes/s", shown: "a second", least: 500},
	{p: "P14", what: "acknowledged registrations by the admin API, 64 callers, whole: store (Badger), audit log, picture, answer", source: register, bench: "CreateEntry", unit: "entries/s", shown: "a second", least: 4000},
	{p: "P14", what: "of that the store alone: transactions, synced, chained, 64 writers", source: store, bench: "Txn/writers=64", unit: "txn/s", shown: "a second", least: 4000},
	{p: "P14", what: "entries registered through the API a second, one a call, 64 callers : SPIRE", source: spireRegister, bench: "Register", unit: "merlon-entries/s", over: "spire-entries/s", shown: "×", least: 1, stretch: true},
	{p: "P14", what: "the same, CPU of the server for each", source: spireRegister, bench: "Register", unit: "merlon-own-µs", over: "spire-own-µs", shown: "×", most: 1, stretch: true},
}

// asked says whether the target is among those asked for; all are without any.
func (t target) asked(only map[string]bool) bool { return len(only) == 0 || only[t.p] }

// names are the targets in order.
func names() (all []string) {
	for _, t := range targets {
		if !slices.Contains(all, t.p) {
			all = append(all, t.p)
		}
	}
	return all
}

func known(p string) bool { return slices.Contains(names(), p) }
