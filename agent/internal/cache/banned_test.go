// What an agent does about its own ban.

package cache

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
)

func TestBannedAgentServesNothingUntilTheCAServesIt(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		s := f.Subscribe()
		defer s.Close()
		s.View(proves("unix:uid:1"), true)
		first := take(t, s, "unix:uid:1").SVIDs[0]
		e, _ := f.Entitled(proves("unix:uid:1"))
		if _, err := f.JWTSVID(t.Context(), e[0], []string{"x"}, func() error { return nil }); err != nil {
			t.Fatal(err)
		}
		_, _, cursor, _ := f.RevocationsSince(Cursor{})

		agent := spiffeid.RequireFromString("spiffe://" + td + "/agent/n1")
		f.Disconnected()
		for range 2 { // it hears of it at each try
			f.Ban(t.Context(), agent, 7)
		}
		records, _, cursor, _ := f.RevocationsSince(cursor)
		if len(records) != 1 || records[0].AgentID != agent.String() || records[0].AgentHandle != 7 {
			t.Errorf("watchers are told %v; want what was issued through the agent, once", records)
		}
		if v := s.View(proves("unix:uid:1"), true); len(v.SVIDs) != 0 || len(v.Entries) != 1 || v.Current {
			t.Errorf("View() has %d SVIDs of %d entries, current %v; want none of one, and that it may not be all", len(v.SVIDs), len(v.Entries), v.Current)
		}
		if got, err := f.JWTSVID(t.Context(), e[0], []string{"x"}, func() error { return nil }); err == nil {
			t.Errorf("JWTSVID() = %q; want none", got)
		}
		if snapshot := f.Snapshot(agent.String(), true); len(snapshot.SVIDs)+len(snapshot.JWTs) != 0 {
			t.Errorf("%d X509-SVIDs and %d JWT-SVIDs go to the disk; want none", len(snapshot.SVIDs), len(snapshot.JWTs))
		}

		// Unbanned, with the CA's own record, from which on SVIDs count again.
		synctest.Wait() // what the CA was asked for meanwhile is revoked
		f.ca.set(func(c *signer) { c.revision = 200 })
		f.apply(&capb.SyncResponse{Revision: 200, Revocations: []*capb.Revocation{{
			Subject: &capb.Revocation_AgentId{AgentId: agent.String()}, AgentHandle: 7, BeforeRevision: 100,
			ExpiresAt: timestamppb.New(time.Now().Add(time.Hour)),
		}}})
		f.TryAgain()
		v := take(t, s, "unix:uid:1")
		if paths(v) != "/a" || v.SVIDs[0].Peer.SerialHex == first.Peer.SerialHex {
			t.Errorf("SVIDs = %q; want a fresh one", paths(v))
		}
		if records, reset, _, _ := f.RevocationsSince(cursor); !reset || len(records) != 1 || records[0].BeforeRevision != 100 {
			t.Errorf("watchers are told %v, reset %v; want the CA's record in place of the agent's", records, reset)
		}
	})
}
