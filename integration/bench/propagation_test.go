// P2: how long a change takes from the operator's call to the workload, on one
// machine, over real processes. The distribution is printed as metrics.

package bench_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/metadata"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/unixsock"
)

func TestMain(m *testing.M) {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	m.Run()
	stage.RemoveBins()
}

func dial(b *testing.B, path string) *grpc.ClientConn {
	b.Helper()
	cc, err := grpc.NewClient("unix:"+strings.TrimPrefix(path, "unix://"), grpc.WithTransportCredentials(unixsock.ClientCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cc.Close() })
	return cc
}

// identities sends the set of SPIFFE IDs of each message of the stream.
func identities(b *testing.B, d *stage.Domain) <-chan []string {
	b.Helper()
	ctx := metadata.AppendToOutgoingContext(b.Context(), "workload.spiffe.io", "true")
	stream, err := workload.NewSpiffeWorkloadAPIClient(dial(b, d.WorkloadAPI)).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		b.Fatal(err)
	}
	out := make(chan []string, 1000)
	go func() {
		defer close(out)
		for {
			resp, err := stream.Recv()
			if err != nil {
				return
			}
			var ids []string
			for _, s := range resp.GetSvids() {
				ids = append(ids, s.GetSpiffeId())
			}
			out <- ids
		}
	}()
	return out
}

// until reads messages until one satisfies done.
func until(b *testing.B, messages <-chan []string, done func([]string) bool) {
	b.Helper()
	timeout := time.After(30 * time.Second)
	for {
		select {
		case ids, ok := <-messages:
			if !ok {
				b.Fatal("the stream ended")
			}
			if done(ids) {
				return
			}
		case <-timeout:
			b.Fatal("no such message within 30 s")
		}
	}
}

// report publishes the distribution of took as metrics.
func report(b *testing.B, what string, took []time.Duration) {
	slices.Sort(took)
	at := func(q float64) float64 {
		return float64(took[int(q*float64(len(took)-1))].Microseconds()) / 1000
	}
	b.ReportMetric(at(0.5), what+"-p50-ms")
	b.ReportMetric(at(0.99), what+"-p99-ms")
	b.ReportMetric(at(1), what+"-max-ms")
}

func BenchmarkRegistrationReachesWorkload(b *testing.B) {
	for _, entries := range []int{0, 100_000} {
		b.Run(fmt.Sprintf("entries=%d", entries), func(b *testing.B) {
			d := stage.Dev(b)
			admin := capb.NewAdminClient(dial(b, d.Admin))
			d.Entry("/base") // keeps the stream open
			fill(b, admin, entries)
			messages := identities(b, d)
			until(b, messages, func(ids []string) bool { return len(ids) > 0 })
			exe, err := os.Executable()
			if err != nil {
				b.Fatal(err)
			}
			parent := onlyAgent(b, admin)
			var appear, vanish []time.Duration
			for i := 0; b.Loop(); i++ {
				id := d.ID(fmt.Sprintf("/e%d", i))
				begun := time.Now()
				resp, err := admin.CreateEntry(b.Context(), &capb.CreateEntryRequest{Entry: &capb.Entry{
					SpiffeId: id, ParentId: parent, Selectors: []*capb.Selector{{Type: "unix", Value: "path:" + exe}},
				}})
				if err != nil {
					b.Fatal(err)
				}
				until(b, messages, func(ids []string) bool { return slices.Contains(ids, id) })
				appear = append(appear, time.Since(begun))
				begun = time.Now()
				if _, err := admin.DeleteEntry(b.Context(), &capb.DeleteEntryRequest{EntryId: resp.GetEntry().GetEntryId()}); err != nil {
					b.Fatal(err)
				}
				until(b, messages, func(ids []string) bool { return !slices.Contains(ids, id) })
				vanish = append(vanish, time.Since(begun))
			}
			report(b, "created", appear)
			report(b, "deleted", vanish)
		})
	}
}

func onlyAgent(b *testing.B, admin capb.AdminClient) string {
	b.Helper()
	resp, err := admin.ListAgents(b.Context(), &capb.ListAgentsRequest{})
	if err != nil || len(resp.GetAgents()) != 1 {
		b.Fatalf("agents = %v, %v; want one", resp.GetAgents(), err)
	}
	return resp.GetAgents()[0].GetSpiffeId()
}

// fill registers n entries that match nothing here.
func fill(b *testing.B, admin capb.AdminClient, n int) {
	b.Helper()
	parent := onlyAgent(b, admin)
	work := make(chan int)
	errs := make(chan error, 64)
	for range cap(errs) {
		go func() {
			var err error
			for i := range work {
				if err == nil {
					err = register(b.Context(), admin, parent, i)
				}
			}
			errs <- err
		}()
	}
	for i := range n {
		work <- i
	}
	close(work)
	for range cap(errs) {
		if err := <-errs; err != nil {
			b.Fatal(err)
		}
	}
}

func register(ctx context.Context, admin capb.AdminClient, parent string, i int) error {
	td := strings.Split(parent, "/")[2]
	_, err := admin.CreateEntry(ctx, &capb.CreateEntryRequest{Entry: &capb.Entry{
		SpiffeId: fmt.Sprintf("spiffe://%s/fill/%d", td, i), ParentId: parent,
		Selectors: []*capb.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", 1_000_000+i)}},
	}})
	return err
}
