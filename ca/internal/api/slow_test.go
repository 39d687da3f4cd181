// An agent that stops reading, over real HTTP/2: it answers pings, and takes nothing.

package api

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// asPeer takes each connection for one of peer, as if it had shown its SVID.
type asPeer struct {
	credentials.TransportCredentials
	peer *svid.Peer
}

func (c asPeer) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return raw, tlsInfo{Peer: c.peer}, nil
}

func (c asPeer) Clone() credentials.TransportCredentials { return c }

func TestAgentThatTakesNothingIsLeft(t *testing.T) {
	s, agent := newService(t)
	s.takeTimeout = 200 * time.Millisecond
	var ops []store.Op
	for i := range 40 { // 4 MiB
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
	p := peerOf(t, agent.ID.String(), agent.Handle, agent.Revision)
	p.NotAfter = time.Now().Add(time.Hour)
	srv := grpc.NewServer(append(s.serverOptions(accessTable()), grpc.Creds(asPeer{insecure.NewCredentials(), p}))...)
	capb.RegisterNodeServer(srv, s)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()
	defer func() {
		srv.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	conn, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
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
	// It reads nothing, and is left.
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
