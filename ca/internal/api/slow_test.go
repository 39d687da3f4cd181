// An agent that stops reading, over real HTTP/2: it answers pings, and takes nothing.

package api

import (
	"context"
	"fmt"
	"math"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/store"
)

// asPeer takes each connection for one of somebody who has shown an SVID: of whom,
// shown says.
type asPeer struct {
	credentials.TransportCredentials
	shown func(raw net.Conn) tlsInfo
}

func (c asPeer) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info := c.shown(raw)
	if info.conn != nil {
		return info.conn, info, nil
	}
	return raw, info, nil
}

func (c asPeer) Clone() credentials.TransportCredentials { return c }

// serve serves agents over TCP, who show what shown says, and returns the address.
func (s *Service) serve(tb testing.TB, shown func(raw net.Conn) tlsInfo) string {
	tb.Helper()
	srv := grpc.NewServer(append(s.serverOptions(accessTable()), grpc.Creds(asPeer{insecure.NewCredentials(), shown}))...)
	capb.RegisterNodeServer(srv, s)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()
	tb.Cleanup(func() {
		srv.Stop()
		if err := <-served; err != nil {
			tb.Error(err)
		}
	})
	return lis.Addr().String()
}

func TestAgentThatTakesNothingIsLeft(t *testing.T) {
	for name, tt := range map[string]struct{ counted, roomy bool }{
		"nobody counts what is on its way":                  {},
		"it is counted":                                     {counted: true},
		"gRPC keeps a sender waiting though there was room": {counted: true, roomy: true},
	} {
		t.Run(name, func(t *testing.T) {
			s, agent := newService(t)
			s.takeTimeout = 200 * time.Millisecond
			if tt.roomy {
				s.roomBytes = math.MaxInt
			}
			fill(t, s, agent)
			p := peerOf(t, agent.ID.String(), agent.Handle, agent.Revision)
			takeNothing(t, s, s.serve(t, func(raw net.Conn) tlsInfo {
				if !tt.counted {
					return tlsInfo{Peer: p}
				}
				return tlsInfo{Peer: p, conn: s.unread.open(raw, p.ID.String())}
			}))
		})
	}
}

// fill registers 4 MiB of entries for the agent.
func fill(t *testing.T, s *Service, agent *attest.Agent) {
	t.Helper()
	var ops []store.Op
	for i := range 40 {
		e := &entry.Entry{ID: entry.NewID(), SPIFFEID: agentWorkload(i), ParentID: agent.ID}
		for j := range 35 {
			e.Selectors = append(e.Selectors, entry.Selector{Type: "unix", Value: fmt.Sprintf("path:/%s/%d", strings.Repeat("a", 2990), j)})
		}
		value, err := entry.Encode(e)
		if err != nil {
			t.Fatal(err)
		}
		if ops = append(ops, store.Put(registry.EntryPrefix+e.ID, value)); len(ops) == 8 {
			res, err := s.opts.Store.Txn(t.Context(), nil, ops, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.registry.Wait(t.Context(), res.Revision); err != nil {
				t.Fatal(err)
			}
			ops = nil
		}
	}
}

// takeNothing opens a stream and reads nothing from it, until it is left.
func takeNothing(t *testing.T, s *Service, address string) {
	t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := capb.NewNodeClient(conn).Sync(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&capb.SyncRequest{}); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, _, _, streams := s.registry.Counts(); streams == 0 && refusedForTakingNothing(t, s) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("its stream goes on")
		}
	}
}

func agentWorkload(i int) spiffeid.ID { return spiffeid.RequireFromPathf(td, "/w/%d", i) }

// refusedForTakingNothing says whether the audit log says so.
func refusedForTakingNothing(t *testing.T, s *Service) bool {
	t.Helper()
	for line, err := range s.opts.Audit.Recent(100) {
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(line.Text), "has taken nothing") {
			return true
		}
	}
	return false
}
