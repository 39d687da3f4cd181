// Merlon beside SPIRE, in turn in one run: how long an entry takes to reach a workload
// (P2), what the Workload API, issuing and registering cost (P5, P1, P14), and memory.

package spire_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/metadata"

	"merlon.dev/integration/measure"
	"merlon.dev/integration/stage"
)

func TestMain(m *testing.M) {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	m.Run()
	stage.RemoveBins()
}

// BenchmarkEntryReachesWorkload (P2) is from the call that registers an entry until its
// SVID is on the open stream of the workload: NAME-p50-ms and NAME-max-ms. SPIRE's agent
// asks every five seconds, so it is called at any time within them.
func BenchmarkEntryReachesWorkload(b *testing.B) {
	both := sides(b)
	streams, took := map[string]<-chan []string{}, map[string][]float64{}
	for _, s := range both {
		register(b, s, s.node, "/base", os.Getuid())
		streams[s.name] = identities(b, s)
	}
	for i := 0; b.Loop(); i++ {
		for _, s := range both {
			time.Sleep(rand.N(5 * time.Second))
			id := fmt.Sprintf("/e%d", i)
			begun := time.Now()
			entryID := register(b, s, s.node, id, os.Getuid())
			until(b, s.name, streams[s.name], func(ids []string) bool { return slices.Contains(ids, "spiffe://"+trustDomain+id) })
			took[s.name] = append(took[s.name], float64(time.Since(begun).Microseconds())/1000)
			if err := s.remove(b.Context(), entryID); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(0, "ns/op") // of both together
	for name, ms := range took {
		b.ReportMetric(measure.Median(ms), name+"-p50-ms")
		b.ReportMetric(slices.Max(ms), name+"-max-ms")
	}
}

func register(b *testing.B, s *side, node, path string, uid int) (entryID string) {
	b.Helper()
	entryID, err := s.create(b.Context(), node, path, uid)
	if err != nil {
		b.Fatalf("%s: register %s: %v", s.name, path, err)
	}
	return entryID
}

// identities sends the SPIFFE IDs of each message of a stream that stays open.
func identities(b *testing.B, s *side) <-chan []string {
	b.Helper()
	cc, out := local(b, s.workloadAPI), make(chan []string, 1000)
	var stream grpc.ServerStreamingClient[workload.X509SVIDResponse]
	var first *workload.X509SVIDResponse
	stage.Eventually(b, s.name+" has an SVID for the workload", func() (err error) {
		if stream, err = fetch(b.Context(), cc); err == nil {
			first, err = stream.Recv()
		}
		return err
	})
	go func() {
		defer close(out)
		for resp, err := first, error(nil); err == nil; resp, err = stream.Recv() {
			var ids []string
			for _, s := range resp.GetSvids() {
				ids = append(ids, s.GetSpiffeId())
			}
			out <- ids
		}
	}()
	return out
}

func fetch(ctx context.Context, cc *grpc.ClientConn) (grpc.ServerStreamingClient[workload.X509SVIDResponse], error) {
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	return workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
}

// until reads messages until one satisfies done.
func until(b *testing.B, name string, messages <-chan []string, done func([]string) bool) {
	b.Helper()
	timeout := time.After(time.Minute)
	for {
		select {
		case ids, ok := <-messages:
			if !ok {
				b.Fatalf("%s: the stream ended", name)
			}
			if done(ids) {
				return
			}
		case <-timeout:
			b.Fatalf("%s: no such message within a minute", name)
		}
	}
}

const callers, asked = 32, 10

// BenchmarkFirstAnswer (P5) is rounds of 32 callers that ask for their X509-SVID ten
// times each, beside 1 000 entries on the node: NAME-own-µs is the agent's CPU for each.
// And memory: NAME-agent-idle-MiB and NAME-server-idle-MiB before there is any entry,
// NAME-…-loaded-MiB after the rounds; between them NAME-rest-%core, what agent and server
// take together with these entries while nothing happens.
func BenchmarkFirstAnswer(b *testing.B) {
	both := sides(b)
	var variants []measure.Variant
	figures := make(map[string]float64)
	for _, s := range both {
		memory(b, s, "idle", figures)
		all(b, 64, 1000, func(i int) error {
			_, err := s.create(b.Context(), s.node, fmt.Sprintf("/fill/%d", i), 1_000_000+i)
			return err
		})
		register(b, s, s.node, "/me", os.Getuid())
		identities(b, s)
		settle(b, s)
		figures[s.name+"-rest-%core"] = rest(b, s)
		variants = append(variants, measure.Variant{Name: s.name, Run: asking(b, s), Ops: callers * asked, Processes: []int{s.agent}})
	}
	measure.Interleaved(b, 1, variants...)
	for _, s := range both {
		memory(b, s, "loaded", figures)
	}
	for unit, v := range figures {
		b.ReportMetric(v, unit)
	}
}

// asking makes a round.
func asking(b *testing.B, s *side) func() error {
	b.Helper()
	var clients [callers]*grpc.ClientConn
	for i := range clients {
		clients[i] = local(b, s.workloadAPI)
	}
	return func() error {
		errs := make([]error, callers)
		var wg sync.WaitGroup
		for i, cc := range clients {
			wg.Go(func() {
				for range asked {
					ctx, cancel := context.WithCancel(b.Context())
					stream, err := fetch(ctx, cc)
					if err == nil {
						_, err = stream.Recv()
					}
					cancel()
					if err != nil {
						errs[i] = err
						return
					}
				}
			})
		}
		wg.Wait()
		return errors.Join(errs...)
	}
}

// BenchmarkIssue (P1) is an agent's calls for 100 X509-SVIDs each: NAME-own-µs is the
// server's CPU for one.
func BenchmarkIssue(b *testing.B) {
	const batch = 100
	var variants []measure.Variant
	for _, s := range sides(b) {
		node, sign := s.join(b)
		var orders []order
		for i := range batch {
			_, csr := newKey(b)
			orders = append(orders, order{entryID: register(b, s, node, fmt.Sprintf("/w%d", i), 1_000_000+i), csr: csr})
		}
		run := func() error { return sign(b.Context(), orders) }
		stage.Eventually(b, s.name+" signs", run) // SPIRE's server has its entries anew every five seconds
		variants = append(variants, measure.Variant{Name: s.name, Run: run, Ops: batch, Processes: []int{s.server}})
	}
	measure.Interleaved(b, 1, variants...)
}

// BenchmarkRegister (P14) is 64 callers that register an entry in each call:
// NAME-entries/s, and NAME-own-µs of the server's CPU for each.
func BenchmarkRegister(b *testing.B) {
	const writers, each = 64, 10
	var variants []measure.Variant
	took, done := map[string]time.Duration{}, map[string]int{}
	for _, s := range sides(b) {
		var next atomic.Int64
		variants = append(variants, measure.Variant{Name: s.name, Ops: writers * each, Processes: []int{s.server}, Run: func() error {
			begun := time.Now()
			all(b, writers, writers*each, func(int) error {
				n := int(next.Add(1))
				_, err := s.create(b.Context(), s.node, fmt.Sprintf("/r/%d", n), 1_000_000+n)
				return err
			})
			took[s.name] += time.Since(begun)
			done[s.name] += writers * each
			return nil
		}})
	}
	measure.Interleaved(b, 1, variants...)
	for name, n := range done {
		b.ReportMetric(float64(n)/took[name].Seconds(), name+"-entries/s")
	}
}

// all does n things, so many at a time.
func all(b *testing.B, atOnce, n int, do func(i int) error) {
	b.Helper()
	var next atomic.Int64
	errs := make([]error, atOnce)
	var wg sync.WaitGroup
	for w := range atOnce {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(n) && errs[w] == nil; i = next.Add(1) {
				errs[w] = do(int(i))
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		b.Fatal(err)
	}
}

func memory(b *testing.B, s *side, when string, figures map[string]float64) {
	b.Helper()
	for what, pid := range map[string]int{"agent": s.agent, "server": s.server} {
		now, _ := measure.MemoryOf(b, pid)
		figures[s.name+"-"+what+"-"+when+"-MiB"] = float64(now) / (1 << 20)
	}
}

// settle waits until the agent has done what the entries make it do: SPIRE's gets an
// SVID for each.
func settle(b *testing.B, s *side) {
	b.Helper()
	for range 60 {
		before := measure.CPUOf(b, s.agent)
		time.Sleep(6 * time.Second) // it asks once in five
		if measure.CPUOf(b, s.agent)-before < 300*time.Millisecond {
			return
		}
	}
	b.Fatalf("%s: the agent is not at rest within 6 minutes", s.name)
}

// rest is what agent and server take while nothing happens.
func rest(b *testing.B, s *side) (percent float64) {
	b.Helper()
	const pause = 10 * time.Second
	before := measure.CPUOf(b, s.agent) + measure.CPUOf(b, s.server)
	time.Sleep(pause)
	used := measure.CPUOf(b, s.agent) + measure.CPUOf(b, s.server) - before
	return 100 * used.Seconds() / pause.Seconds()
}
