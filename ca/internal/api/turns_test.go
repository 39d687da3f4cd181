package api

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// Those that have begun come first, each kind in its order.
func TestTurnsGoToHandshakesThatHaveBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &turns{free: 1}
		s.take(false)
		var mu sync.Mutex
		var order []string
		var all sync.WaitGroup
		for _, w := range []struct {
			name  string
			begun bool
		}{{"fresh 1", false}, {"fresh 2", false}, {"begun 1", true}, {"begun 2", true}} {
			all.Go(func() {
				if !s.take(w.begun) {
					t.Errorf("%s has no turn", w.name)
				}
				mu.Lock()
				order = append(order, w.name)
				mu.Unlock()
				s.give()
			})
			synctest.Wait()
		}
		s.give()
		all.Wait()
		if want := []string{"begun 1", "begun 2", "fresh 1", "fresh 2"}; !slices.Equal(order, want) {
			t.Errorf("turns went to %v; want %v", order, want)
		}
		if s.free != 1 {
			t.Errorf("%d turns are free; want 1", s.free)
		}
	})
}

// Who waits too long is sent away, and its place is nobody's.
func TestTurnsSendAwayWhoWaitedTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &turns{free: 1}
		s.take(false)
		begun := time.Now()
		if s.take(false) {
			t.Error("there were two turns")
		}
		if waited := time.Since(begun); waited != freshPatience {
			t.Errorf("sent away after %v; want %v", waited, freshPatience)
		}
		s.give()
		if s.free != 1 || !s.take(false) {
			t.Errorf("%d turns are free; want 1", s.free)
		}
	})
}

// A client that goes silent in the middle of its handshake has nobody's turn, and
// while nobody has one, there is no handshake.
func TestSilentClientHoldsUpNoHandshake(t *testing.T) {
	td := forge.New(t, "shop.test")
	server, client := td.Intermediate().Leaf("/ca").X509SVID(), td.Intermediate().Leaf("/web").X509SVID()
	admit := func(*svid.Peer) error { return nil }
	s := &Service{turns: &turns{free: 1}}
	creds := s.newServerCreds(svid.TLS{SVIDs: server, Bundles: td.Bundle(), Admit: admit}.Server())
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	var serving sync.WaitGroup
	defer serving.Wait()
	ended := make(chan error, 8)
	serving.Go(func() {
		for {
			raw, err := lis.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer raw.Close()
				conn, _, err := creds.ServerHandshake(raw)
				ended <- err
				if err == nil {
					io.Copy(conn, conn)
				}
			})
		}
	})
	dial := func() net.Conn {
		raw, err := net.Dial("tcp", lis.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { raw.Close() })
		return raw
	}
	cfg := svid.TLS{SVIDs: client, Bundles: td.Bundle(), Admit: svid.AdmitID(spiffeid.RequireFromString("spiffe://shop.test/ca"))}.Client()
	quiet := &silent{dial(), make(chan struct{})}
	var muttering sync.WaitGroup
	defer muttering.Wait()
	muttering.Go(func() { tls.Client(quiet, cfg).Handshake() })
	for range 3 { // which have turns after it, and give them back
		conn := tls.Client(dial(), cfg)
		if err := conn.Handshake(); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}

	s.turns.take(false) // and all the others have none
	late := dial()
	if err := tls.Client(late, cfg).Handshake(); err == nil {
		t.Error("a handshake without a turn succeeded")
	}
	if err := <-ended; !errors.Is(err, errNoTurn) {
		t.Errorf("the server says %v; want %v", err, errNoTurn)
	}
	lis.Close()
	quiet.Close()
	close(quiet.end)
}

// silent sends what it is given, and reads nothing until the end.
type silent struct {
	net.Conn
	end chan struct{}
}

func (s *silent) Read([]byte) (int, error) {
	<-s.end
	return 0, io.EOF
}
