package decisionlog

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/policy"
)

// calls are as many different ones as there are sources.
func calls(sources int) []*policy.Input {
	all := make([]*policy.Input, sources)
	for i := range all {
		all[i] = &policy.Input{
			Source: fmt.Sprintf("spiffe://shop.test/ns/shop/web-%d", i), Destination: "spiffe://shop.test/ns/shop/orders", Protocol: policy.HTTP,
			Method: "GET", Path: "/orders/17/lines", Host: "orders.internal:8443", SourceAddress: "10.1.2.3:41234", DestinationAddress: "10.1.2.4:8443",
			SourceSerial: "7f00c1a2b3c4d5e6f708192a3b4c5d6e7f8091a2",
		}
	}
	return all
}

var (
	allowed = policy.Decision{Allow: true, Reason: policy.Allowed, RuleID: "web-reads-orders", Revision: 7}
	denied  = policy.Decision{Reason: policy.MethodNotGranted, Revision: 7}
)

// run records from all processors at once, while somebody takes the records out.
func run(b *testing.B, all []*policy.Input, d policy.Decision) {
	b.Helper()
	r := NewRecorder(Options{Records: 1 << 14})
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-r.Woken():
				r.Take(1<<14, func(*Record) {})
			}
		}
	}()
	now := time.Now()
	for _, in := range all { // the first call of a row allocates it
		r.Record(in, &d, now)
	}
	var turn atomic.Uint64
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		own := d
		for i := turn.Add(1) * 7919; pb.Next(); i++ {
			own.DecisionID = policy.NewDecisionID()
			r.Record(all[i%uint64(len(all))], &own, now)
		}
	})
	b.StopTimer()
	close(stop)
	<-stopped
}

func BenchmarkRecordAllowed(b *testing.B) { run(b, calls(512), allowed) }
func BenchmarkRecordDenied(b *testing.B)  { run(b, calls(512), denied) }
func BenchmarkRecordBeyondTheRows(b *testing.B) {
	run(b, calls(4096), denied)
}

func BenchmarkRecordDeniedWithHeaders(b *testing.B) {
	all := calls(512)
	for _, in := range all {
		in.Headers = map[string][]string{}
		for i := range 10 {
			in.Headers[fmt.Sprintf("x-header-%d", i)] = []string{"some value of a header"}
		}
	}
	run(b, all, denied)
}
