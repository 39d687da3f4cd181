// A call as a context, and its end by the policy.

package sdk

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/policy/program"
)

// onConnection enters a connection of web, and gives its TLS state.
func onConnection(t testing.TB, id *Identity) *tls.ConnectionState {
	t.Helper()
	cs := &tls.ConnectionState{HandshakeComplete: true, PeerCertificates: []*x509.Certificate{{}}}
	id.conns.add(&cs.PeerCertificates[0], &liveConn{peer: peerUnder("aa"), end: time.Now().Add(time.Hour), remote: "10.0.0.1:1", local: "10.0.0.2:2"}, time.Now())
	return cs
}

func begin(t testing.TB, ctx context.Context, id *Identity, ended func(policy.Decision)) *Call { //nolint:revive // t first, as in all tests
	t.Helper()
	c := id.Begin(ctx, onConnection(t, id), web("/a"), ended)
	if d := c.Decision(); !d.Allow {
		t.Fatalf("%+v", d)
	}
	return c
}

// deny takes every right away, as of generation.
func deny(t *testing.T, id *Identity, generation uint64) {
	t.Helper()
	id.generation.Store(generation)
	id.takePrograms(t.Context(), &agentpb.WatchPolicyResponse{PolicyGeneration: generation, Programs: []*agentpb.Program{
		{Destination: ownID, Encoded: program.Encode(&program.Source{Destination: ownID, Generation: generation})},
	}})
}

func TestCallIsTheContextOfItsHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := withProgram(t, 7)
		type key struct{}
		parent, cancel := context.WithDeadline(context.WithValue(t.Context(), key{}, "value"), time.Now().Add(time.Hour))
		c := begin(t, parent, id, nil)
		defer c.End()
		if peer, ok := PeerFromContext(c); !ok || peer.ID.String() != "spiffe://sdktest.test/web" {
			t.Errorf("peer %v", peer)
		}
		if d, ok := DecisionFromContext(c); !ok || d.DecisionID != c.Decision().DecisionID {
			t.Errorf("decision %+v", d)
		}
		if at, ok := c.Deadline(); !ok || time.Until(at) != time.Hour || c.Value(key{}) != "value" || c.Err() != nil || context.Cause(c) != nil {
			t.Error("it is not the context that it came with")
		}
		below, stop := context.WithCancel(c)
		defer stop()
		cancel()
		<-below.Done()
		if c.Err() == nil || !errors.Is(context.Cause(below), context.Canceled) {
			t.Errorf("after the transport's end: %v", c.Err())
		}
	})
}

// The context ends with the denial, whatever the handler did with it before.
func TestDenialEndsTheContext(t *testing.T) {
	for name, before := range map[string]func(context.Context) (wait func()){
		"nothing": func(context.Context) func() { return func() {} },
		"waits":   func(ctx context.Context) func() { done := ctx.Done(); return func() { <-done } },
		"looks":   func(ctx context.Context) func() { _ = ctx.Err(); return func() {} },
		"has a child": func(ctx context.Context) func() {
			child, cancel := context.WithTimeout(ctx, time.Hour)
			return func() { <-child.Done(); cancel() }
		},
		"has a waiter": func(ctx context.Context) func() {
			done := make(chan struct{})
			context.AfterFunc(ctx, func() { close(done) })
			return func() { <-done }
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				id := withProgram(t, 7)
				go id.followCalls(t.Context())
				told := make(chan policy.Decision, 2)
				var c *Call
				c = begin(t, t.Context(), id, func(d policy.Decision) {
					if c.Err() != nil {
						t.Error("the context ended first")
					}
					told <- d
				})
				wait := before(c)
				synctest.Wait()
				deny(t, id, 8)
				synctest.Wait()
				wait()
				d, ended := c.Denied()
				if !ended || d.Allow || d.Revision != 8 || len(told) != 1 {
					t.Fatalf("%+v, told %d times", d, len(told))
				}
				cause, ok := errors.AsType[*DeniedError](context.Cause(c))
				if !errors.Is(c.Err(), context.Canceled) || !ok || cause.DecisionID != d.DecisionID.String() {
					t.Errorf("ended with %v for %v", c.Err(), context.Cause(c))
				}
				c.End()
				c.End()
				if again, ok := errors.AsType[*DeniedError](context.Cause(c)); !ok || again.DecisionID != cause.DecisionID {
					t.Errorf("its end made the cause %v", context.Cause(c))
				}
			})
		})
	}
}

func TestEndEndsTheContext(t *testing.T) {
	id := withProgram(t, 7)
	for name, asked := range map[string]bool{"waited for": true, "never asked for": false} {
		c := begin(t, t.Context(), id, func(policy.Decision) { t.Error("the policy did not end it") })
		if asked {
			select {
			case <-c.Done():
				t.Fatal("it has ended")
			default:
			}
		}
		c.End()
		if !errors.Is(c.Err(), context.Canceled) || !errors.Is(context.Cause(c), context.Canceled) {
			t.Errorf("%s: %v", name, c.Err())
		}
		<-c.Done()
		if _, ended := c.Denied(); ended {
			t.Errorf("%s: the policy ended it", name)
		}
	}
	if n := len(id.calls.all()); n != 0 {
		t.Errorf("%d calls are left", n)
	}
}

// A call that is denied at once is not under way.
func TestDeniedCallsAreNotFollowed(t *testing.T) {
	id := withProgram(t, 7)
	in := web("/a")
	for name, c := range map[string]*Call{
		"without a connection": id.Begin(t.Context(), &tls.ConnectionState{}, in, nil),
		"without input":        id.Begin(t.Context(), onConnection(t, id), nil, nil),
	} {
		if c.Decision().Allow || len(id.calls.all()) != 0 {
			t.Errorf("%s: %+v", name, c.Decision())
		}
		c.Cut("nothing is there to be cut")
		c.End()
	}
}

// The connection tells the addresses, unless the enforcement point knows better.
func TestAddressesComeFromTheConnection(t *testing.T) {
	id := withProgram(t, 7)
	for want, in := range map[string]*policy.Input{
		"10.0.0.1:1 10.0.0.2:2": web("/a"),
		"9.9.9.9:9 10.0.0.2:2":  {Protocol: policy.HTTP, Method: "GET", Path: "/a", SourceAddress: "9.9.9.9:9"},
	} {
		if peer, d := id.Ask(t.Context(), onConnection(t, id), in); !d.Allow || peer == nil || in.SourceAddress+" "+in.DestinationAddress != want {
			t.Errorf("%s %s; want %s", in.SourceAddress, in.DestinationAddress, want)
		}
	}
}

func TestCallsUnderWayCostOneAllocation(t *testing.T) {
	id := withProgram(t, 7)
	cs, in := onConnection(t, id), web("/a")
	id.Ask(t.Context(), cs, in) // the first call of a row allocates it
	if n := testing.AllocsPerRun(100, func() { id.Ask(t.Context(), cs, in) }); n != 0 {
		t.Errorf("to ask takes %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { id.Begin(t.Context(), cs, in, nil).End() }); n != 1 {
		t.Errorf("a call takes %v allocations", n)
	}
}

// Whatever the number of calls at a time, each is found, and ends once: by itself or
// by the policy.
func TestTableOfCallsUnderWay(t *testing.T) {
	const workers, each = 8, firstRow
	id := bare()
	var ended sync.Map // *Call → struct{}
	var wg sync.WaitGroup
	calls := make([][]*Call, workers)
	for w := range calls {
		wg.Go(func() {
			for range each {
				c := &Call{id: id, in: &policy.Input{}}
				c.ended = func(policy.Decision) {
					if _, twice := ended.LoadOrStore(c, struct{}{}); twice {
						t.Error("a call was ended twice")
					}
				}
				id.calls.add(c)
				calls[w] = append(calls[w], c)
			}
		})
	}
	wg.Wait()
	if n := len(id.calls.all()); n != workers*each {
		t.Fatalf("%d calls are in the table; want %d", n, workers*each)
	}
	var own int
	var mu sync.Mutex
	for w := range calls { // both at once
		wg.Go(func() { id.redecide(t.Context(), false) }) // without TLS, nothing is allowed
		wg.Go(func() {
			n := 0
			for _, c := range calls[w] {
				if id.calls.remove(c) {
					n++
				}
			}
			mu.Lock()
			defer mu.Unlock()
			own += n
		})
	}
	wg.Wait()
	byPolicy := 0
	ended.Range(func(any, any) bool { byPolicy++; return true })
	if own+byPolicy != workers*each || len(id.calls.all()) != 0 {
		t.Errorf("%d calls ended by themselves, %d by the policy, %d are left; there were %d", own, byPolicy, len(id.calls.all()), workers*each)
	}
}
