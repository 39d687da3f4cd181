// Who comes by for our trust bundle: those who were invited, and nobody's inventions.

package api

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"merlon.dev/ca/internal/federation"
)

func TestOnlyInvitedReadersAreRemembered(t *testing.T) {
	s, _ := newService(t)
	invite := func(held *federation.Invite) *federation.Invite {
		t.Helper()
		i := federation.NewInvite(partner, time.Now(), held)
		op, err := i.Put()
		if err != nil {
			t.Fatal(err)
		}
		keep(t, s, op)
		return i
	}
	writeDown := func() *federation.Invite {
		t.Helper()
		if err := s.noteReaders(t.Context(), s.readers.take()); err != nil {
			t.Fatal(err)
		}
		kv, _, err := s.opts.Store.Get(t.Context(), federation.InvitePrefix+partner.Name())
		if err != nil {
			t.Fatal(err)
		}
		i, err := federation.DecodeInvite(kv)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.registry.Wait(t.Context(), kv.ModRevision); err != nil {
			t.Fatal(err)
		}
		return i
	}
	first := invite(nil)
	for i := range 5000 { // any number of them leaves room for the one that was given out
		s.NoteReader(strings.Repeat("a", 20)+fmt.Sprintf("%06d", i), 1)
	}
	s.NoteReader(first.Reader, 3)
	if len(s.readers.seen) != 1 {
		t.Errorf("%d readers are remembered; want the one that was invited", len(s.readers.seen))
	}
	if first = writeDown(); first.Sequence != 3 || first.FetchedAt.IsZero() {
		t.Errorf("%+v; want it seen with 3", first)
	}
	second := invite(first)
	s.NoteReader(first.Reader, 4)
	if got := writeDown(); got.Sequence != 4 || got.Previous != first.Reader {
		t.Errorf("by the earlier URL: %+v", got)
	}
	s.NoteReader(second.Reader, 5)
	if got := writeDown(); got.Sequence != 5 || got.Previous != "" {
		t.Errorf("by the new URL: %+v", got)
	}
	s.NoteReader(first.Reader, 6)
	if len(s.readers.seen) != 0 {
		t.Error("the earlier URL still counts")
	}
}
