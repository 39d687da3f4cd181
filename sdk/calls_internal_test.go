// Calls under way, decided again: by the clock, without a change, and with nobody to
// ask.

package sdk

import (
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/policy/program"
)

func TestCallsEndWithTheirGrant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := bare()
		src := program.Source{Destination: ownID, Generation: 7, Grants: []program.Grant{
			{ID: "short", Kind: program.Allow, Protocol: policy.HTTP, Expires: time.Now().Add(10 * time.Second).UnixNano()},
		}}
		id.generation.Store(7)
		id.takePrograms(t.Context(), &agentpb.WatchPolicyResponse{PolicyGeneration: 7, Programs: []*agentpb.Program{{Destination: ownID, Encoded: program.Encode(&src)}}})
		go id.followCalls(t.Context())
		in := web("/a")
		in.Destination = ownID
		ended := make(chan policy.Decision, 2)
		stop := id.Follow(in, id.Authorize(t.Context(), in), func(d policy.Decision) { ended <- d })
		other := id.Follow(in, policy.Decision{Revision: 7}, func(policy.Decision) { t.Error("a call that is over was ended") })
		other()
		time.Sleep(9 * time.Second)
		synctest.Wait()
		if len(ended) != 0 {
			t.Fatalf("it ended before its grant: %+v", <-ended)
		}
		time.Sleep(redecideEvery + time.Second)
		synctest.Wait()
		if len(ended) != 1 {
			t.Fatalf("%d ends after the grant's end", len(ended))
		}
		if d := <-ended; d.Allow || d.Reason != policy.PathNotGranted && d.Reason != policy.NoGrant {
			t.Errorf("%+v", d)
		}
		stop()
		if n := len(id.calls.all()); n != 0 {
			t.Errorf("%d calls are left", n)
		}
	})
}

// A policy that changes between a decision and Follow is not missed.
func TestFollowLooksAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := withProgram(t, 7)
		go id.followCalls(t.Context())
		in := web("/a")
		in.Destination = ownID
		d := id.Authorize(t.Context(), in)
		denies := program.Encode(&program.Source{Destination: ownID, Generation: 8})
		id.generation.Store(8)
		id.takePrograms(t.Context(), &agentpb.WatchPolicyResponse{PolicyGeneration: 8, Programs: []*agentpb.Program{{Destination: ownID, Encoded: denies}}})
		synctest.Wait() // that change has been seen to
		ended := make(chan policy.Decision, 1)
		start := time.Now()
		defer id.Follow(in, d, func(d policy.Decision) { ended <- d })()
		if d := <-ended; d.Allow || d.Revision != 8 || time.Since(start) > 0 {
			t.Errorf("%+v after %v", d, time.Since(start))
		}
	})
}
