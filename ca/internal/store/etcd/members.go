package etcd

// The members of the cluster, with a connection each. All requests go to one
// member that is known to work; a member that stops answering, or has lost the
// others, is left within seconds.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	probeEvery   = time.Second
	probeTimeout = 2 * time.Second
	// keepAlive* make gRPC notice a dead connection; 10 s is the least that it
	// allows. The timeout is also that of unacknowledged bytes in TCP.
	keepAliveTime    = 10 * time.Second
	keepAliveTimeout = 3 * time.Second
)

var (
	// errNotConnected is why a member was not asked.
	errNotConnected = errors.New("not connected")
	errNotProbed    = errors.New("not probed yet")
	errOtherCluster = errors.New("endpoints of different clusters")
)

// members is safe for concurrent use.
type members struct {
	all     []*member
	log     *slog.Logger
	key     string // what probes read
	stop    context.CancelFunc
	probing sync.WaitGroup

	mu      sync.Mutex
	current int    // guarded by mu; the member that is asked
	cluster uint64 // guarded by mu; what all must belong to; 0: not known yet
}

// member is safe for concurrent use.
type member struct {
	url    string
	client *clientv3.Client
	nudge  chan struct{} // asks for a probe now
	probed chan struct{} // closed after the first probe

	mu      sync.Mutex
	err     error              // guarded by mu; of the last probe, errNotProbed before
	because error              // guarded by mu; why the last attempt to connect failed, if one did
	ejected context.Context    // guarded by mu; ends when requests must leave
	eject   context.CancelFunc // guarded by mu
}

func newMembers(cfg Config, key string) (*members, error) {
	p := &members{log: cfg.Logger, key: key}
	var files *fileCredentials
	for _, url := range cfg.Endpoints {
		u, err := checkEndpoint(url)
		if err != nil {
			return nil, err
		}
		creds := grpc.WithTransportCredentials(insecure.NewCredentials())
		if u.Scheme == "https" {
			if files == nil {
				if files, err = newFileCredentials(cfg); err != nil {
					p.closeClients()
					return nil, err
				}
			}
			creds = grpc.WithTransportCredentials(files)
		}
		client, err := dial(url, creds)
		if err != nil {
			p.closeClients()
			return nil, fmt.Errorf("etcd: endpoint %s: %v", url, err)
		}
		m := &member{url: url, client: client, nudge: make(chan struct{}, 1), probed: make(chan struct{}), err: errNotProbed}
		m.ejected, m.eject = context.WithCancel(context.Background())
		p.all = append(p.all, m)
	}
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	for _, m := range p.all {
		p.probing.Go(func() { p.probe(ctx, m) })
	}
	return p, nil
}

func dial(url string, creds grpc.DialOption) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:            []string{url},
		DialKeepAliveTime:    keepAliveTime,
		DialKeepAliveTimeout: keepAliveTimeout,
		MaxUnaryRetries:      1, // which requests are safe to repeat is decided here
		Logger:               zap.NewNop(),
		DialOptions: []grpc.DialOption{creds, grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 2 * time.Second,
		})},
	})
}

func (p *members) close() {
	p.stop()
	p.probing.Wait()
	p.closeClients()
}

func (p *members) closeClients() {
	for _, m := range p.all {
		m.eject()
		m.client.Close()
	}
}

// settle waits until every member has been probed, and refuses members of
// different clusters: which of them is meant would be left to chance.
func (p *members) settle(ctx context.Context) error {
	for _, m := range p.all {
		select {
		case <-m.probed:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := m.fault(); errors.Is(err, errOtherCluster) {
			return fmt.Errorf("etcd: %s: %w", m.url, err)
		}
	}
	return nil
}

// pick returns the member to ask.
func (p *members) pick() *member {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.all[p.current]
}

// leave moves on from m, to one that works if there is one, and has m probed.
func (p *members) leave(m *member) {
	m.probeNow()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all[p.current] != m {
		return // somebody was quicker
	}
	here := p.current
	for i := 1; i < len(p.all); i++ {
		next := (here + i) % len(p.all)
		switch err := p.all[next].fault(); {
		case err == nil:
			p.current = next
			return
		case errors.Is(err, errNotProbed): // the best so far
			p.current = next
		}
	}
}

func (m *member) probeNow() {
	select {
	case m.nudge <- struct{}{}:
	default:
	}
}

// probe asks a member from time to time for something that it can answer only
// together with the leader.
func (p *members) probe(ctx context.Context, m *member) {
	for {
		err := p.probeOnce(ctx, m)
		if ctx.Err() != nil {
			return
		}
		p.probed(ctx, m, err)
		select {
		case <-time.After(probeEvery):
		case <-m.nudge:
			time.Sleep(10 * time.Millisecond) // bounds what a storm of failures asks
		case <-ctx.Done():
			return
		}
	}
}

func (p *members) probeOnce(ctx context.Context, m *member) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	if err := m.connected(ctx); err != nil {
		return err
	}
	res, err := m.client.Get(ctx, p.key, clientv3.WithCountOnly())
	switch {
	case err == nil:
		return p.sameCluster(res.Header.ClusterId)
	case faultOf(err) == permanent:
		return nil // an answer, if not a nice one
	}
	return err
}

// sameCluster refuses a member of another cluster than the first that
// answered.
func (p *members) sameCluster(id uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cluster == 0 {
		p.cluster = id
	}
	if p.cluster != id {
		return fmt.Errorf("%w: one belongs to %x, others to %x", errOtherCluster, id, p.cluster)
	}
	return nil
}

// probed takes the result of a probe over. While no member works, requests
// stay where they are: there is nothing to move to.
func (p *members) probed(ctx context.Context, m *member, err error) {
	before := m.setFault(err)
	notProbed := errors.Is(before, errNotProbed)
	if notProbed {
		close(m.probed)
	}
	switch {
	case err != nil && (before == nil || notProbed):
		p.log.LogAttrs(ctx, slog.LevelWarn, "etcd member does not work", slog.String("endpoint", m.url), slog.Any("err", err))
	case err == nil && before != nil && !notProbed:
		p.log.LogAttrs(ctx, slog.LevelInfo, "etcd member works again", slog.String("endpoint", m.url))
	}
	works := -1
	for i, other := range p.all {
		if other.fault() == nil {
			works = i
		}
	}
	if works < 0 {
		return
	}
	p.mu.Lock()
	if p.all[p.current].broken() {
		p.current = works
	}
	p.mu.Unlock()
	for _, other := range p.all {
		if other.broken() {
			other.ejectAll()
		}
	}
}

// broken says that a probe has failed.
func (m *member) broken() bool {
	err := m.fault()
	return err != nil && !errors.Is(err, errNotProbed)
}

func (m *member) fault() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// setFault returns the fault before.
func (m *member) setFault(err error) (before error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	before, m.err = m.err, err
	return before
}

// ejectAll ends the requests that wait for the member.
func (m *member) ejectAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.eject()
	m.ejected, m.eject = context.WithCancel(context.Background())
}

// while returns a context that ends when the member must be left, too.
func (m *member) while(ctx context.Context) (context.Context, context.CancelFunc) {
	m.mu.Lock()
	ejected := m.ejected
	m.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ejected, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}

// connected waits for the connection; it fails as soon as an attempt has.
func (m *member) connected(ctx context.Context) error {
	conn := m.client.ActiveConnection()
	for {
		state := conn.GetState()
		switch state {
		case connectivity.Ready:
			m.setReason(nil)
			return nil
		case connectivity.TransientFailure, connectivity.Shutdown:
			return m.notConnected(ctx)
		case connectivity.Idle:
			conn.Connect()
		}
		if !conn.WaitForStateChange(ctx, state) {
			return fmt.Errorf("%s: %w: %v", m.url, errNotConnected, m.reason(ctx.Err()))
		}
	}
}

// notConnected asks gRPC why the last attempt to connect has failed: a request
// fails at once, with the reason, if it is not one of clientv3's.
func (m *member) notConnected(ctx context.Context) error {
	_, err := pb.NewKVClient(m.client.ActiveConnection()).Range(ctx, &pb.RangeRequest{Key: []byte("reason"), CountOnly: true})
	if err == nil {
		err = errors.New("connecting")
	} else if ctx.Err() == nil {
		m.setReason(err)
	}
	return fmt.Errorf("%s: %w: %v", m.url, errNotConnected, m.reason(err))
}

// setReason keeps why an attempt to connect failed; nil when it did not. In TLS
// 1.3 a member that refuses our certificate cuts the connection behind its alert,
// and whether the alert is read first is luck: what an earlier attempt heard of
// TLS is not replaced by a mere cut.
func (m *member) setReason(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil || m.because == nil || !ofTLS(m.because) || !cut(err) {
		m.because = err
	}
}

// ofTLS says whether an attempt failed by TLS; gRPC passes reasons on as text.
func ofTLS(err error) bool {
	return strings.Contains(err.Error(), "tls: ") || strings.Contains(err.Error(), "x509: ")
}

// cut says whether the other side ended the connection without a word.
func cut(err error) bool {
	return slices.ContainsFunc([]string{syscall.EPIPE.Error(), syscall.ECONNRESET.Error(), io.EOF.Error()}, func(words string) bool {
		return strings.Contains(err.Error(), words)
	})
}

// reason is why it was not connected when that was last known, else err.
func (m *member) reason(err error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.because != nil {
		return m.because
	}
	return err
}
