// A join token is worth one agent: of 200 attempts on two replicas, and with the
// CA killed between using it up and answering.

package ca_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/stage"
)

// On Badger: TestJoinTokenWorksOnceOfManyParallelAttempts.
func TestJoinTokenWorksOnceOfManyAttemptsOnTwoReplicas(t *testing.T) {
	e := stage.StartEtcd(t, 3)
	first := startCA(t, tempDir(t), onEtcd(e))
	second := startCA(t, tempDir(t), onEtcd(e), first.joining("b"))
	token := first.joinToken("n1")
	clients := make([]*testClient, 10)
	for i := range clients {
		clients[i] = []*testCA{first, second}[i%2].client(nil, nil)
	}
	const attempts = 200
	var wins atomic.Int32
	var wg sync.WaitGroup
	for i := range attempts {
		_, csr := newCSR(t)
		wg.Go(func() {
			if _, err := clients[i%len(clients)].node.Attest(context.Background(), attestRequest(token, csr)); err == nil {
				wins.Add(1)
			} else {
				wantCode(t, err, codes.PermissionDenied)
			}
		})
	}
	wg.Wait()
	if wins.Load() != 1 {
		t.Errorf("%d of %d attestations with one token succeeded; want 1", wins.Load(), attempts)
	}
}

func attestRequest(token string, csr []byte) *capb.AttestRequest {
	return &capb.AttestRequest{Evidence: &capb.AttestRequest_JoinToken{JoinToken: token}, Csr: csr}
}

func TestCAKilledOverAJoinTokenMakesAtMostOneAgent(t *testing.T) {
	t.Run("badger", func(t *testing.T) { killOverTokens(t) })
	t.Run("etcd", func(t *testing.T) {
		e := stage.StartEtcd(t, 3)
		killOverTokens(t, "-store", "etcd", "-etcd-endpoints", strings.Join(e.Endpoints(), ","),
			"-etcd-ca-file", e.Files.CA, "-etcd-cert-file", e.Files.Cert, "-etcd-key-file", e.Files.Key)
	})
}

// tokensPerKill are redeemed at once, so that each is somewhere else when the CA
// is killed.
const tokensPerKill = 8

// killOverTokens kills the CA a few times (20 with MERLON_LONG) while join
// tokens are redeemed: in turn as soon as its audit log says that one was, which
// is before the answer, and after a random delay.
func killOverTokens(t *testing.T, flags ...string) {
	kills := 4
	if os.Getenv("MERLON_LONG") != "" {
		kills = 20
	}
	dir := tempDir(t)
	address := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	flags = append(flags, "-address", address)
	var outcomes struct{ answered, usedUp, untouched int }
	cmd, admin := startProcess(t, dir, flags...)
	for round := range kills {
		tokens := make(map[string]string) // by agent
		for i := range tokensPerKill {
			name := fmt.Sprintf("n%d-%d", round, i)
			resp, err := admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: name})
			if err != nil {
				t.Fatal(err)
			}
			tokens["spiffe://shop.test/agent/"+name] = resp.GetToken()
		}
		node := dialNode(t, address)
		answered := redeem(t, node, tokens, func() {
			if round%2 == 0 {
				awaitAttest(t, filepath.Join(dir, "data", "audit.jsonl"), round)
			} else {
				time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
		})
		_ = cmd.Wait() // killed, as it should be

		cmd, admin = startProcess(t, dir, flags...)
		before := agents(t, admin)
		again := redeem(t, dialNode(t, address), tokens, nil)
		after := agents(t, admin)
		for id := range tokens {
			switch {
			case answered[id] && again[id]:
				t.Errorf("%s: its token was taken twice", id)
			case answered[id] && before[id] != 1:
				t.Errorf("%s was given an SVID; its record is lost", id)
			case before[id] == 1 && again[id]:
				t.Errorf("%s: its token was taken, though the agent is there", id)
			case before[id] == 0 && !again[id]:
				t.Errorf("%s: its token is used up, and the agent is not there", id)
			case after[id] != 1:
				t.Errorf("%s: %d agents", id, after[id])
			case answered[id]:
				outcomes.answered++
			case before[id] == 1:
				outcomes.usedUp++
			default:
				outcomes.untouched++
			}
		}
	}
	t.Logf("killed %d times: %d tokens were answered, %d used up without an answer, %d not yet used", kills, outcomes.answered, outcomes.usedUp, outcomes.untouched)
}

// redeem attests an agent with each token at once and meanwhile; true: it was
// given an SVID. What the CA refuses, it must refuse for the token's sake.
func redeem(t *testing.T, node capb.NodeClient, tokens map[string]string, meanwhile func()) map[string]bool {
	t.Helper()
	var (
		mu  sync.Mutex
		won = make(map[string]bool)
		wg  sync.WaitGroup
	)
	for id, token := range tokens {
		_, csr := newCSR(t)
		wg.Go(func() {
			_, err := node.Attest(context.Background(), attestRequest(token, csr))
			if code := status.Code(err); code != codes.OK && code != codes.PermissionDenied && code != codes.Unavailable {
				t.Errorf("%s: %v", id, err)
			}
			mu.Lock()
			defer mu.Unlock()
			won[id] = err == nil
		})
	}
	if meanwhile != nil {
		meanwhile()
	}
	wg.Wait()
	return won
}

// dialNode connects and makes sure of it, so that what follows takes no time for
// the handshake.
func dialNode(t *testing.T, address string) capb.NodeClient {
	t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(clientTLS(nil, nil))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	node := capb.NewNodeClient(conn)
	_, err = node.Attest(t.Context(), &capb.AttestRequest{}, grpc.WaitForReady(true))
	wantCode(t, err, codes.InvalidArgument)
	return node
}

// awaitAttest waits until the audit log has an attestation of the round's
// agents.
func awaitAttest(t *testing.T, path string, round int) {
	t.Helper()
	want := fmt.Appendf(nil, `"spiffe_id":"spiffe://shop.test/agent/n%d-`, round)
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Microsecond) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
			return
		}
		if i := bytes.LastIndex(b, want); i >= 0 && bytes.Contains(b[bytes.LastIndexByte(b[:i], '\n')+1:], []byte(`"type":"attest"`)) {
			return
		}
	}
	t.Errorf("no attestation of round %d in the audit log", round)
}

// agents counts the agents by SPIFFE ID.
func agents(t *testing.T, admin capb.AdminClient) map[string]int {
	t.Helper()
	list, err := admin.ListAgents(t.Context(), &capb.ListAgentsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	n := make(map[string]int)
	for _, a := range list.GetAgents() {
		n[a.GetSpiffeId()]++
	}
	return n
}
