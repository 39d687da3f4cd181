// Rotation of the root as workloads see it: not at all. Handshakes go on while
// roots come and go and the CA is killed.

package integration_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"merlon.dev/integration/measure"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

// sizeOf is a setting of `make rotate`, or its small value.
func sizeOf(t *testing.T, name string, small int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return small
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q is no number", name, text)
	}
	return n
}

// echo answers each connection with one byte.
func echo(t *testing.T, id *sdk.Identity) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	t.Cleanup(func() { lis.Close(); serving.Wait() })
	serving.Go(func() {
		for {
			raw, err := lis.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer raw.Close()
				conn, err := id.ServerHandshake(context.Background(), raw)
				if err != nil {
					return // the client sees it, and counts
				}
				defer conn.Close()
				conn.Write([]byte{1})
			})
		}
	})
	return lis.Addr().String()
}

// handshake makes one connection, and waits for the byte, which comes when both
// sides have accepted each other.
func handshake(ctx context.Context, id *sdk.Identity, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := id.DialTLS(sdk.Service("me"))(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	_, err = io.ReadFull(conn, make([]byte, 1))
	return err
}

// answering serves HTTP by the policy.
func answering(t *testing.T, id *sdk.Identity) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{
		Handler:   httpauth.Handler(id, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})),
		TLSConfig: id.ServerTLS(), ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0),
	}
	done := make(chan struct{})
	go func() { defer close(done); srv.ServeTLS(lis, "", "") }()
	t.Cleanup(func() { srv.Close(); <-done })
	return "https://" + lis.Addr().String()
}

// request makes one over a pooled connection.
func request(ctx context.Context, client *http.Client, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil) // which net/http does not send twice
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	return nil
}

// P13. `make rotate` runs it 20 times under 500 handshakes a second, with 200
// workloads.
func TestRootRotatesUnderHandshakes(t *testing.T) {
	t.Parallel() // it mostly waits
	d := stage.Separate(t, "trust_refresh_hint: 1s")
	rotateUnderHandshakes(t, d, sizeOf(t, "ROTATIONS", 2), func() []*stage.Process { return []*stage.Process{d.CA} })
}

// The same on two replicas and one etcd, of which each is killed in turn: `make
// rotate-replicas`.
func TestRootOfTwoReplicasRotatesUnderHandshakes(t *testing.T) {
	t.Parallel() // it mostly waits
	c := stage.StartCluster(t, 1, 2, "trust_refresh_hint: 1s")
	c.Join()
	rotateUnderHandshakes(t, c.Domain, sizeOf(t, "ROTATIONS", 2), func() []*stage.Process {
		return []*stage.Process{c.Replicas[0].Process, c.Replicas[1].Process}
	})
}

// rotateUnderHandshakes replaces the root while workloads connect to each other.
// In every second round each step is followed by the kill of one of the CAs.
func rotateUnderHandshakes(t *testing.T, d *stage.Domain, rounds int, cas func() []*stage.Process) {
	t.Helper()
	perSecond, workloads := sizeOf(t, "HANDSHAKES", 50), sizeOf(t, "WORKLOADS", 4)
	d.Entry("/me")
	var ids []*sdk.Identity
	var addresses, urls []string
	var clients []*http.Client
	grants(t, d, "http: {}")
	for range workloads {
		id, err := sdk.Open(t.Context(), sdk.WithAgentAddress(d.WorkloadAPI), sdk.WithLogger(slog.New(slog.DiscardHandler)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(id.Close)
		ids = append(ids, id)
		addresses = append(addresses, echo(t, id))
		urls = append(urls, answering(t, id))
		clients = append(clients, httpauth.Client(id, sdk.Service("me")))
		t.Cleanup(clients[len(clients)-1].CloseIdleConnections)
	}
	ctx, stop := context.WithCancel(t.Context())
	var made, requests, failed atomic.Int64
	var running sync.WaitGroup
	running.Go(func() {
		pace := time.NewTicker(time.Second / time.Duration(perSecond))
		defer pace.Stop()
		for n := 0; ; n++ {
			select {
			case <-ctx.Done():
				return
			case <-pace.C:
			}
			running.Go(func() {
				made.Add(1)
				if err := handshake(context.WithoutCancel(ctx), ids[n%workloads], addresses[(n/workloads)%workloads]); err != nil && failed.Add(1) <= 5 {
					t.Errorf("handshake %d: %v", n, err)
				}
			})
			running.Go(func() { // over connections that outlive rotations, and new ones
				requests.Add(1)
				if err := request(context.WithoutCancel(ctx), clients[n%workloads], urls[(n/workloads)%workloads]); err != nil && failed.Add(1) <= 5 {
					t.Errorf("request %d: %v", n, err)
				}
			})
		}
	})
	begun := time.Now()
	kills := 0
	for round := range rounds {
		stage.RotateRoot(d, func() {
			if round%2 == 1 { // the first round shows that it works without
				all := cas()
				all[kills%len(all)].Kill()
				all[kills%len(all)].Restart()
				kills++
			}
		})
	}
	took := time.Since(begun)
	stop()
	running.Wait()
	t.Logf("%d rotations in %s, %d kills of a CA, %d handshakes (%.0f a second) and as many requests (%d) by the policy, %d failed",
		rounds, took.Round(time.Second), kills, made.Load(), float64(made.Load())/took.Seconds(), requests.Load(), failed.Load())
	measure.Print("RootRotation", map[string]float64{
		"failed": float64(failed.Load()), "handshakes/s": float64(made.Load()) / took.Seconds(), "handshakes": float64(made.Load()), "rotations": float64(rounds),
	})
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d handshakes failed; want none", n, made.Load())
	}
}

// An agent that stands still holds a new root back, and is named.
func TestStuckAgentHoldsActivationBack(t *testing.T) {
	t.Parallel() // it mostly waits
	d := stage.Separate(t, "trust_refresh_hint: 1s")
	d.Entry("/me")
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, d); return err })
	if err := syscall.Kill(d.Agent.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	d.Merlon("authority", "prepare", "--kind", "x509-root")
	time.Sleep(4 * time.Second) // three hints
	next, err := stage.AuthorityIn(d, "x509-root", "published")
	if err != nil || next.Pending == nil || next.Pending.Ready || !slices.Equal(next.Pending.Agents, []string{d.AgentID()}) {
		t.Errorf("pending = %+v, %v; want it to wait for %s", next.Pending, err, d.AgentID())
	}
	if status := d.Merlon("authority", "status"); !strings.Contains(status, "1 agents: "+d.AgentID()) {
		t.Errorf("status = %s; want it to name %s", status, d.AgentID())
	}
	if _, stderr, err := d.Try("authority", "activate", next.ID); err == nil || !strings.Contains(stderr, d.AgentID()) || !strings.Contains(stderr, "hint: merlon authority status") {
		t.Errorf("activate: %v %s; want it to name %s", err, stderr, d.AgentID())
	}
	if err := syscall.Kill(d.Agent.PID(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	stage.Done(d, "authority", "activate", next.ID)
	// Nothing is lost: the agent serves SVIDs under the new root when it is time.
	stage.Done(d, "authority", "taint", mustBe(t, d, "old").ID)
	stage.Eventually(t, "the SVID is replaced", func() error {
		own, err := fetch(t, d)
		if err == nil && len(own.Certificates) > 1 && fmt.Sprintf("%x", own.Certificates[len(own.Certificates)-1].AuthorityKeyId) != next.ID {
			err = errors.New("it is under the old root")
		}
		return err
	})
}

func mustBe(t *testing.T, d *stage.Domain, state string) stage.Authority {
	t.Helper()
	a, err := stage.AuthorityIn(d, "x509-root", state)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
