package faults_test

// Rows about many agents, and about what hostile clients do to the others: R10, R15,
// R16. What 10 000 agents do, integration/scale says.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/history"
	"merlon.dev/sdk/unixsock"
)

// herd is R10.
func herd(r *run) {
	w := faults.New(r, faults.Setup{})
	w.Peers()
	agents := r.size(30, 1000)
	h := w.Herd(agents)
	w.Work(4)
	time.Sleep(300 * time.Millisecond)
	w.Deny()
	for range r.size(2, 10) {
		w.Kill("SIGKILL of the CA", r.bound(readyWithin))
		since := history.Now()
		w.Until("every agent is in sync again", r.bound(time.Minute), func() error { return h.Heard(since) })
	}
	r.number("agents", agents)
	r.verdict(w)
}

// revokeMany is R15.
func revokeMany(r *run) {
	w := faults.New(r, faults.Setup{})
	w.Peers()
	agents := r.size(30, 1000)
	h := w.Herd(agents)
	w.Work(4)
	time.Sleep(300 * time.Millisecond)
	w.Deny()
	mended := w.Rec.Break("a storm of revocations")
	began := time.Now()
	var banned []int
	var last uint64
	for i := 0; i < agents; i += 10 {
		banned = append(banned, i)
		last = max(last, h.Ban(i))
	}
	revocations := r.size(60, 5000)
	for i := range revocations {
		last = max(last, h.Revoke(i%agents))
	}
	r.number("storm", fmt.Sprintf("%d banned of %d, %d revoked, in %v", len(banned), agents, revocations, time.Since(began).Round(time.Millisecond)))
	w.Until("every other agent has every revocation", r.bound(5*time.Second), func() error {
		return errors.Join(h.Reached(last, banned...), h.Told(banned...))
	})
	mended()
	refused := 0
	for _, i := range banned {
		if op := h.Sign(i); op.Outcome != history.OK {
			refused++
		}
	}
	if refused != len(banned) {
		r.Errorf("%d of %d banned agents get SVIDs", len(banned)-refused, len(banned))
	}
	if op := h.Sign(1); op.Outcome != history.OK {
		r.Errorf("an agent that is not banned: %s", op.Detail)
	}
	r.verdict(w)
}

// attack is R16.
func attack(r *run) {
	w := faults.New(r, faults.Setup{})
	registerMe(r, w)
	w.Peers()
	w.Work(2)
	time.Sleep(300 * time.Millisecond)
	w.Deny()
	span := time.Duration(r.size(2, 30)) * time.Second
	quiet := history.Now()
	time.Sleep(span)
	mended := w.Rec.Break("hostile clients")
	hostile := history.Now()
	stop := hostileClients(r, w)
	time.Sleep(span)
	end := history.Now()
	stop()
	mended()
	before, meanwhile := p99(w, quiet, hostile), p99(w, hostile, end)
	r.number("p99 of calls between healthy peers", fmt.Sprintf("%v, under attack %v", before.Round(100*time.Microsecond), meanwhile.Round(100*time.Microsecond)))
	if r.full && meanwhile > 2*before {
		r.Errorf("p99 of healthy calls went from %v to %v; want at most twice as much", before, meanwhile)
	}
	w.Until("writes go on", r.bound(2*time.Second), func() error { return w.TryWrite(0) })
	r.verdict(w)
}

// p99 is of calls over pooled connections that began in a time.
func p99(w *faults.World, from, to int64) time.Duration {
	var took []time.Duration
	for _, op := range w.Rec.History().Ops {
		if op.Kind == history.Call && op.Outcome == history.OK && op.Begin >= from && op.Begin < to {
			took = append(took, time.Duration(op.End-op.Begin))
		}
	}
	if len(took) == 0 {
		return 0
	}
	slices.Sort(took)
	return took[len(took)*99/100]
}

// hostileClients bothers CA, agent and a workload until stop is called.
func hostileClients(r *run, w *faults.World) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	repeat := func(do func() error) {
		running.Go(func() {
			for ctx.Err() == nil {
				_ = do() // whatever comes of it
				time.Sleep(2 * time.Millisecond)
			}
		})
	}
	targets := []string{w.GRPC, strings.TrimPrefix(w.HTTPS, "https://"), w.PeerAddress("/orders")}
	var idle []net.Conn
	for i := range r.size(150, 3000) {
		if c, err := net.DialTimeout("tcp", targets[i%len(targets)], time.Second); err == nil {
			idle = append(idle, c)
		}
	}
	for _, target := range targets {
		for _, text := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x08\x06\x00\x00\x00\x00\x00aaaaaaaa"} {
			repeat(func() error {
				c, err := net.DialTimeout("tcp", target, time.Second)
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write([]byte(text))
				return err
			})
		}
		repeat(func() error { // a handshake, and nothing after it
			c, err := tls.DialWithDialer(&net.Dialer{Timeout: time.Second}, "tcp", target, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
			if err != nil {
				return err
			}
			return c.Close()
		})
	}
	repeat(func() error { return guessToken(ctx, w) })
	hoard(ctx, r, w)
	return func() {
		cancel()
		running.Wait()
		for _, c := range idle {
			c.Close()
		}
	}
}

// guessToken shows the CA a token that it never made.
func guessToken(ctx context.Context, w *faults.World) error {
	cc, err := grpc.NewClient(w.GRPC, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})))
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err = capb.NewNodeClient(cc).Attest(ctx, &capb.AttestRequest{Evidence: &capb.AttestRequest_JoinToken{JoinToken: strings.Repeat("guess", 8)}, Csr: make([]byte, 4096)})
	return err
}

// hoard opens streams at the Workload API and reads none of them.
func hoard(ctx context.Context, r *run, w *faults.World) {
	cc, err := grpc.NewClient("unix:"+strings.TrimPrefix(w.WorkloadAPI, "unix://"), grpc.WithTransportCredentials(unixsock.ClientCredentials()))
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { cc.Close() })
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	for range r.size(300, 2000) {
		// Refused or not, it goes on; whether others are served is what counts.
		_, _ = workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	}
}
