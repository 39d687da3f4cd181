package decisionlog

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/integration/measure"
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

// run records from all processors at once, into twice as many places as the SDK has:
// with many more each record would be written past the processor's cache. Who comes by
// takes the records out, so that none is dropped, which would cost less; that is part
// of the figure.
func run(b *testing.B, all []*policy.Input, d policy.Decision) {
	b.Helper()
	r := NewRecorder(Options{Records: 1 << 10})
	now := time.Now()
	for _, in := range all { // the first call of a row allocates it
		r.Record(in, &d, now)
	}
	r.Take(1<<10, func(*Record) {})
	before := r.Dropped()
	var turn atomic.Uint64
	var taking sync.Mutex
	b.ReportAllocs()
	b.ResetTimer()
	used := measure.PerOp(b)
	b.RunParallel(func(pb *testing.PB) {
		own := d
		for i := turn.Add(1) * 7919; pb.Next(); i++ {
			own.DecisionID = policy.NewDecisionID()
			r.Record(all[i%uint64(len(all))], &own, now)
			if i%256 == 0 && taking.TryLock() {
				r.Take(1<<10, func(*Record) {})
				taking.Unlock()
			}
		}
	})
	b.StopTimer()
	used()
	b.ReportMetric(float64(r.Dropped()-before)/float64(b.N), "dropped/op")
}

func BenchmarkRecordAllowed(b *testing.B) { run(b, calls(512), allowed) }
func BenchmarkRecordDenied(b *testing.B)  { run(b, calls(512), denied) }
func BenchmarkRecordBeyondTheRows(b *testing.B) {
	run(b, calls(4096), denied)
}

func BenchmarkRecordDeniedWithHeaders(b *testing.B) {
	all := calls(512)
	for _, in := range all {
		headers := policy.HeaderMap{}
		in.Headers = headers
		for i := range 10 {
			headers[fmt.Sprintf("x-header-%d", i)] = []string{"some value of a header"}
		}
	}
	run(b, all, denied)
}
