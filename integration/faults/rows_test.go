package faults_test

// The matrix: which fault, and what is done for it. Each row is a test, TestRow/R1,
// in a short form and, with MERLON_FAULTS=full, in its own.

import (
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"google.golang.org/grpc/grpclog"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/stage"
)

func TestMain(m *testing.M) {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	m.Run()
	stage.RemoveBins()
}

// row is one line of the matrix.
type row struct {
	name, fault string
	do          func(*run)
	// space: it needs a network of its own.
	space bool
}

// run is a row that is under way.
type run struct {
	*testing.T
	result faults.Result
	full   bool
	begun  time.Time
}

// rows in the order of SECURITY.md.
var rows = []row{
	{name: "R1", fault: "SIGKILL of the CA in the midst of writes, issuance and a rotation", do: killCA},
	{name: "R2", fault: "power loss: a disk that forgets what was not synced, syncs that fail, files that are cut and bent", do: losePower},
	{name: "R3", fault: "a full disk, no inodes, a limit of file sizes, a disk that is read-only", do: fillDisk},
	{name: "R4", fault: "the CA is away, for less and (full form) for longer than SVIDs live", do: loseCA},
	{name: "R5", fault: "SIGKILL of the agent, also while the CA is away", do: killAgent},
	{name: "R6", fault: "networks that are cut, one way, both ways, or lose a third of all packets: agent and CA, CA and store, CA and CA", do: partition, space: true},
	{name: "R7", fault: "processes that stand still; clocks that are wrong for a while: of a service and (full form) a sidecar, an agent and the CA", do: haltAndJump},
	{name: "R8", fault: "no file descriptors left, idle connections", do: takeFiles},
	{name: "R9", fault: "little memory and a tenth of a processor", do: starve},
	{name: "R10", fault: "a herd of agents that comes back at once to a CA that was killed", do: herd},
	{name: "R11", fault: "the root is replaced under load, while the CA is killed and its agent cut off", do: rotate},
	{name: "R12", fault: "policy bundles that are corrupt, bombs or forbidden, pushed and (full form) served; an agent's copy that is damaged, or gone", do: spoilPolicy},
	{name: "R13", fault: "etcd: its leader killed, halted, no quorum, defragmented, compacted, without space", do: breakEtcd},
	{name: "R14", fault: "every process is replaced under load; in the full form by earlier versions, and back", do: upgrade},
	{name: "R15", fault: "a storm of revocations: a tenth of all agents banned, SPIFFE IDs revoked", do: revokeMany},
	{name: "R16", fault: "idle connections, half handshakes, garbage, wrong tokens and a hoarder of streams beside healthy peers", do: attack},
	{name: "R17", fault: "an older store put back, keys that are gone, a restore", do: restore},
}

func TestRow(t *testing.T) {
	full := os.Getenv("MERLON_FAULTS") == "full"
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			if !full {
				t.Parallel() // most of them wait
			}
			needsRoot(t)
			t.Cleanup(func() {
				if t.Skipped() { // by what it needs
					t.Error("this machine cannot run the row, see above; a matrix with holes shows nothing")
				}
			})
			if row.space && !stage.InNamespace(t) {
				return
			}
			row.do(begin(t, row.name, row.fault, full))
		})
	}
}

// begin begins a row. Until all is over, and how the processes end has been seen, too, its
// result is that it has not held.
func begin(t *testing.T, row, fault string, full bool) *run {
	t.Helper()
	r := &run{T: t, full: full, result: faults.Begun(row, fault, full), begun: time.Now()}
	faults.Write(t, r.result)
	t.Cleanup(func() {
		r.result.Passed = !t.Failed()
		faults.Write(t, r.result)
	})
	return r
}

// needsRoot skips on a developer's machine.
func needsRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the fault matrix mounts disks, cuts networks and limits processes: it needs root")
	}
}

// size is that of the form which runs.
func (r *run) size(short, full int) int {
	if r.full {
		return full
	}
	return short
}

// bound is a time that is promised for a quiet machine; the short form, which runs
// beside everything else, only wants it to happen.
func (r *run) bound(promised time.Duration) time.Duration {
	if r.full {
		return promised
	}
	return 30 * time.Second
}

// must waits until check succeeds, for at most 45 s.
func (r *run) must(what string, check func() error) {
	r.Helper()
	var err error
	for deadline := time.Now().Add(45 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	r.Fatalf("%s: still %v after 45 s", what, err)
}

// number notes a figure of the result.
func (r *run) number(what string, value any) { r.result.Numbers[what] = fmt.Sprint(value) }

// verdict ends the world, and judges.
func (r *run) verdict(w *faults.World) {
	r.Helper()
	h := w.Finish()
	r.result.Seconds = time.Since(r.begun).Seconds()
	r.result = faults.Report(r, r.result, h)
}
