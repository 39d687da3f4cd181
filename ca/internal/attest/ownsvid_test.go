// Which SVID is the last one, over the real store.

package attest

import (
	"cmp"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/possession"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func TestOnlyTheLastSVIDRecovers(t *testing.T) {
	now := time.Now()
	end := now.Add(time.Hour)
	next := SVID{Serial: "33", NotAfter: now.Add(3 * time.Hour), KeyID: "next"}
	for name, tt := range map[string]struct {
		renewed string // with this key as number 22, after the attestation with 11; both end in an hour
		serial  string
		end     time.Time
		before  uint64 // revisions before the attestation
		refused bool
	}{
		"the first and only":         {serial: "11", end: end},
		"one of before that":         {serial: "10", end: end.Add(-time.Minute), before: 1, refused: true},
		"a renewal that is noted":    {renewed: "second", serial: "22", end: end},
		"the one before it":          {renewed: "second", serial: "11", end: end, refused: true},
		"one that nobody got":        {renewed: "second", serial: "12", end: end, refused: true},
		"a renewal that is not":      {renewed: "second", serial: "23", end: end.Add(time.Minute)},
		"the same key certified now": {renewed: "next", serial: "11", end: end},
	} {
		t.Run(name, func(t *testing.T) {
			st := openStore(t)
			a, err := redeem(t, st, join(t, st, "n1"), now)
			if err != nil {
				t.Fatal(err)
			}
			if tt.renewed != "" {
				if err := Renewed(t.Context(), st, a.ID, SVID{Serial: "11", NotAfter: end}, SVID{Serial: "22", NotAfter: end, KeyID: tt.renewed}); err != nil {
					t.Fatal(err)
				}
			}
			p := &svid.Peer{ID: a.ID, NotAfter: tt.end, SerialHex: tt.serial, OurSerial: true, Serial: svid.Serial{Agent: a.Handle, Revision: a.Revision - tt.before}}
			err = Recovered(t.Context(), st, p, next)
			if tt.refused {
				if !errors.Is(err, ErrCloned) {
					t.Errorf("Recovered() = %v; want ErrCloned", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := record(t, st, "n1"); got.LastSerial != "33" || got.PriorSerial != tt.serial || got.Handle != a.Handle || got.AttestedRevision != a.Revision {
				t.Errorf("record = %+v", got)
			}
			if err := Recovered(t.Context(), st, p, SVID{Serial: "34", NotAfter: next.NotAfter, KeyID: "next"}); err != nil {
				t.Errorf("again with the same key: %v", err)
			}
			if err := Recovered(t.Context(), st, p, SVID{Serial: "35", NotAfter: next.NotAfter, KeyID: "thief"}); !errors.Is(err, ErrCloned) {
				t.Errorf("with another key it recovered twice: %v", err)
			}
		})
	}
	// A decision that came after the picture was looked at.
	st := openStore(t)
	a, err := redeem(t, st, join(t, st, "n1"), now)
	if err != nil {
		t.Fatal(err)
	}
	decide(t, st, a.ID, Evicted, Good)
	p := &svid.Peer{ID: a.ID, NotAfter: end, SerialHex: "11", OurSerial: true, Serial: svid.Serial{Agent: a.Handle, Revision: a.Revision}}
	if err := Recovered(t.Context(), st, p, next); !errors.Is(err, ErrEvicted) {
		t.Errorf("an evicted agent: %v", err)
	}
	p.ID = spiffeid.RequireFromPath(td, "/agent/none")
	if err := Recovered(t.Context(), openStore(t), p, next); !errors.Is(err, ErrUnknownAgent) {
		t.Errorf("an agent that there is not: %v", err)
	}
}

// What is believed of an SVID that has ended: in a world of its own keys.
func TestFormerSVIDIsProved(t *testing.T) {
	now := time.Now()
	ended := func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = now.Add(-61*time.Minute), now.Add(-time.Second)
	}
	long := func(c *x509.Certificate) { c.NotBefore = now.Add(-48 * time.Hour) }
	root := forge.New(t, td.Name(), long)
	inter := root.Intermediate(long)
	agent, workload := inter.Leaf("/agent/n1", ended), inter.Leaf("/web", ended)
	for name, tt := range map[string]struct {
		leaf    *forge.SVID
		roots   *forge.Authority
		tainted []string
		life    time.Duration
		signs   crypto.Signer
		want    Reason
	}{
		"ended a second ago":      {leaf: agent, want: ""},
		"of a workload":           {leaf: workload, want: NotAllowed},
		"issued too long ago":     {leaf: agent, life: 59 * time.Minute, want: NotAllowed},
		"under a tainted root":    {leaf: agent, tainted: []string{hex.EncodeToString(root.Cert.SubjectKeyId)}, want: Untrusted},
		"under a tainted one":     {leaf: agent, tainted: []string{"x", hex.EncodeToString(inter.Cert.SubjectKeyId)}, want: Untrusted},
		"under another's root":    {leaf: agent, roots: forge.New(t, td.Name()), want: Untrusted},
		"signed by somebody else": {leaf: agent, signs: workload.Key, want: NotProved},
	} {
		t.Run(name, func(t *testing.T) {
			roots, life, key := cmp.Or(tt.roots, root), cmp.Or(tt.life, 24*time.Hour), tt.signs
			if key == nil {
				key = tt.leaf.Key
			}
			signature, err := possession.Sign(key, []byte("statement"))
			if err != nil {
				t.Fatal(err)
			}
			former, err := ProveFormer(tt.leaf.Raw(), signature, []byte("statement"), roots.Bundle(), tt.tainted, life, now)
			if tt.want == "" {
				if err != nil || former.ID.Path() != "/agent/n1" {
					t.Errorf("ProveFormer() = %+v, %v", former, err)
				}
				return
			}
			if e, ok := errors.AsType[*RefusedError](err); !ok || e.Reason != tt.want {
				t.Errorf("ProveFormer() = %v; want %s", err, tt.want)
			}
		})
	}
}
