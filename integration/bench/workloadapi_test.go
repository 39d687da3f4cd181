// P5 and the agent at rest: what the real agent takes for an answer of the
// Workload API, for 100 workloads, and for 10 000 entries when nothing happens.
// CPU is the agent's own, by its clock, so that the load of the machine matters
// little.

package bench_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/measure"
	"merlon.dev/integration/stage"
)

const callers = 32

// BenchmarkFirstAnswer (P5) is a round of 32 callers that ask for their
// X509-SVIDs ten times each, beside 1 000 entries, in turn with a stream on the
// same socket that does nothing but answer.
func BenchmarkFirstAnswer(b *testing.B) {
	d := stage.Separate(b)
	untilAttested(b, d)
	fill(b, capb.NewAdminClient(dial(b, d.Admin)), 1000)
	d.Entry("/me")
	var clients [callers]*grpc.ClientConn
	for i := range clients {
		clients[i] = dial(b, d.WorkloadAPI)
	}
	svids := func(ctx context.Context, cc *grpc.ClientConn) error {
		stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	nothing := func(ctx context.Context, cc *grpc.ClientConn) error {
		stream, err := healthpb.NewHealthClient(cc).Watch(ctx, &healthpb.HealthCheckRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	ask(b, clients[:], nothing)
	ask(b, clients[:], svids)                // warm
	var forSVIDs, forNothing time.Duration   // of the agent
	var bothSVIDs, bothNothing time.Duration // and of the callers, which are this process
	calls := 0
	for b.Loop() {
		agent, both := cpuOfRound(b, d, clients[:], svids)
		forSVIDs, bothSVIDs = forSVIDs+agent, bothSVIDs+both
		agent, both = cpuOfRound(b, d, clients[:], nothing)
		forNothing, bothNothing = forNothing+agent, bothNothing+both
		calls += callers * asked
	}
	each := func(cpu time.Duration) float64 { return float64(cpu.Microseconds()) / float64(calls) }
	b.ReportMetric(each(forSVIDs), "svid-µs")
	b.ReportMetric(each(forNothing), "nothing-µs")
	b.ReportMetric(each(forSVIDs)/each(forNothing), "ratio")
	b.ReportMetric(each(bothSVIDs), "both-ends-svid-µs")
	b.ReportMetric(each(bothNothing), "both-ends-nothing-µs")
	b.ReportMetric(each(bothSVIDs)/each(bothNothing), "both-ends-ratio")
}

// cpuOfRound is what one round costs the agent, and both ends together.
func cpuOfRound(b *testing.B, d *stage.Domain, clients []*grpc.ClientConn, call func(context.Context, *grpc.ClientConn) error) (agent, both time.Duration) {
	b.Helper()
	agentBefore, mine := measure.CPUOf(b, d.Agent.PID()), measure.CPU()
	ask(b, clients, call)
	agent = measure.CPUOf(b, d.Agent.PID()) - agentBefore
	return agent, agent + measure.CPU() - mine
}

// asked is how often a caller asks in a round.
const asked = 10

// ask lets every caller make calls, one after the other.
func ask(b *testing.B, clients []*grpc.ClientConn, call func(context.Context, *grpc.ClientConn) error) {
	b.Helper()
	var all sync.WaitGroup
	for _, cc := range clients {
		all.Go(func() {
			for range asked {
				ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(b.Context(), "workload.spiffe.io", "true"))
				if err := call(ctx, cc); err != nil {
					b.Error(err)
				}
				cancel()
			}
		})
	}
	all.Wait()
}

// BenchmarkAgentAtRest starts 100 workloads, each a process with an identity of
// its own, and lets 30 s go by in which nothing happens, with no other entries on
// the node and with 10 000.
func BenchmarkAgentAtRest(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root to run workloads as users of their own")
	}
	for _, entries := range []int{0, 10_000} {
		b.Run(fmt.Sprintf("entries=%d", entries), func(b *testing.B) {
			d := stage.Separate(b)
			untilAttested(b, d)
			admin := capb.NewAdminClient(dial(b, d.Admin))
			fill(b, admin, entries)
			const workloads, firstUser = 100, 20_000
			for i := range workloads {
				if _, err := admin.CreateEntry(b.Context(), &capb.CreateEntryRequest{Entry: &capb.Entry{
					SpiffeId: d.ID(fmt.Sprintf("/w%d", i)), ParentId: d.AgentID(),
					Selectors: []*capb.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", firstUser+i)}},
				}}); err != nil {
					b.Fatal(err)
				}
			}
			for i := range workloads {
				openAs(b, d, firstUser+i, fmt.Sprintf("svids /w%d", i))
			}
			for b.Loop() {
				time.Sleep(5 * time.Second) // what the start left is done
				const rest = 30 * time.Second
				began := measure.CPUOf(b, d.Agent.PID())
				time.Sleep(rest)
				used := measure.CPUOf(b, d.Agent.PID()) - began
				b.ReportMetric(100*used.Seconds()/rest.Seconds(), "%core")
				now, peak := measure.MemoryOf(b, d.Agent.PID())
				b.ReportMetric(float64(now)/(1<<20), "MiB")
				b.ReportMetric(float64(peak)/(1<<20), "MiB-at-most")
			}
		})
	}
}

// untilAttested waits for the agent.
func untilAttested(b *testing.B, d *stage.Domain) {
	b.Helper()
	admin := capb.NewAdminClient(dial(b, d.Admin))
	stage.Eventually(b, "the agent is attested", func() error {
		resp, err := admin.ListAgents(b.Context(), &capb.ListAgentsRequest{})
		if err == nil && len(resp.GetAgents()) != 1 {
			err = fmt.Errorf("%d agents", len(resp.GetAgents()))
		}
		return err
	})
}

// openAs starts a workload as a user, which keeps a stream open until the end.
func openAs(b *testing.B, d *stage.Domain, uid int, want string) {
	b.Helper()
	bin := stage.Bin(b, stage.Build(b, "workload", "integration/workload", ""))
	for _, dir := range []string{filepath.Dir(bin), filepath.Join(filepath.Dir(strings.TrimPrefix(d.WorkloadAPI, "unix://")), "..", "..")} {
		if err := os.Chmod(dir, 0o755); err != nil {
			b.Fatal(err)
		}
	}
	cmd := exec.Command(bin)
	cmd.Dir, cmd.Env, cmd.Stderr = "/", append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+d.WorkloadAPI), os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		stdin.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if _, err := io.WriteString(stdin, "open\n"); err != nil {
		b.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || strings.TrimSpace(line) != want {
		b.Fatalf("user %d got %q, %v; want %q", uid, line, err, want)
	}
}
