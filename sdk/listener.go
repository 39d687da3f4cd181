// A listener for protocols that are neither HTTP nor gRPC: what it hands out is
// through with the handshake and with the decision.

package sdk

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"

	"merlon.dev/policy"
)

// maxHandshakes is how many connections of one listener are on their way to Accept at
// most; more wait in the kernel. Clients that never finish their handshakes, for 5 s
// each, keep others waiting only if there are more than 800 of them a second.
const maxHandshakes = 4096

// Listener makes a listener of mutual TLS connections out of inner, for
// protocols which are neither HTTP nor gRPC. Accept gives only connections
// whose handshake is done and which the policy allows for protocol tcp; all
// others are closed and logged. Up to 4096 handshakes run beside each other, so
// slow clients hold up nobody. The connections are *tls.Conn and are cut when
// the peer is revoked or expires; [Identity.Peer] says who they are. With
// [WithPlaintextUntil] some have no TLS. protocols
// are the ALPN protocols; clients that send none are let in.
func (id *Identity) Listener(inner net.Listener, protocols ...string) net.Listener {
	return id.listener(inner, protocols)
}

// ServerListener makes a listener for an http.Server's Serve out of inner, in the
// place of ServeTLS: what it hands out is through with the handshake, and what a
// peer may do is for httpauth to decide, call by call. It is needed for
// [WithPlaintextUntil] alone, with which Accept also gives connections without TLS.
// protocols are the ALPN protocols, by default h2 and http/1.1.
func (id *Identity) ServerListener(inner net.Listener, protocols ...string) net.Listener {
	l := id.listener(inner, protocols)
	l.perCall = true
	return l
}

func (id *Identity) listener(inner net.Listener, protocols []string) *listener {
	ctx, cancel := context.WithCancel(context.Background())
	return &listener{
		inner: inner, id: id, protocols: protocols,
		ctx: ctx, cancel: cancel,
		results: make(chan accepted), slots: make(chan struct{}, maxHandshakes),
	}
}

type listener struct {
	inner     net.Listener
	id        *Identity
	protocols []string
	perCall   bool // the policy is asked later

	ctx        context.Context // ends with Close
	cancel     context.CancelFunc
	start      sync.Once
	goroutines sync.WaitGroup
	results    chan accepted
	slots      chan struct{}
}

// accepted is what one Accept returns.
type accepted struct {
	conn net.Conn
	err  error
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	l.start.Do(func() { l.goroutines.Go(l.run) })
	select {
	case a := <-l.results:
		return a.conn, a.err
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return l.inner.Addr() }

// Close implements net.Listener. It waits for the handshakes under way, which
// it ends.
func (l *listener) Close() error {
	l.start.Do(func() {}) // from now on there is nothing to run
	l.cancel()
	err := l.inner.Close()
	l.goroutines.Wait()
	return err
}

// run accepts until the inner listener is closed.
func (l *listener) run() {
	for {
		select {
		case l.slots <- struct{}{}:
		case <-l.ctx.Done():
			return
		}
		raw, err := l.inner.Accept()
		if err != nil {
			<-l.slots
			l.deliver(accepted{err: err})
			if l.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				l.cancel()
				return
			}
			continue
		}
		l.goroutines.Go(func() {
			defer func() { <-l.slots }() // also held while nobody accepts
			if conn, ok := l.admit(raw); ok {
				l.deliver(accepted{conn: conn})
			}
		})
	}
}

// admit does the handshake and then asks the policy. The order matters: until
// the handshake is done the peer has shown a chain, which is public, and not
// that it holds the key, so nothing may be decided or recorded in its name.
func (l *listener) admit(raw net.Conn) (net.Conn, bool) {
	conn, cs, err := l.handshake(raw)
	if err != nil {
		return nil, false // logged where the peer was refused
	}
	if l.perCall {
		return conn, true
	}
	_, decision := l.id.Decide(l.ctx, cs, &policy.Input{
		Protocol:           policy.TCP,
		SourceAddress:      addrString(raw.RemoteAddr()),
		DestinationAddress: addrString(raw.LocalAddr()),
	})
	if !decision.Allow {
		_ = conn.Close() // the peer learns no more than that
		return nil, false
	}
	return conn, true
}

// handshake gives a TLS connection with its state, or a plaintext one without.
func (l *listener) handshake(raw net.Conn) (net.Conn, *tls.ConnectionState, error) {
	if conn, err := l.id.Plaintext(l.ctx, raw); conn != nil || err != nil {
		return conn, nil, err
	}
	conn, err := l.id.ServerHandshake(l.ctx, raw, l.protocols...)
	if err != nil {
		return nil, nil, err
	}
	cs := conn.ConnectionState()
	return conn, &cs, nil
}

// deliver hands a result to Accept, or closes the connection with the listener.
func (l *listener) deliver(a accepted) {
	select {
	case l.results <- a:
	case <-l.ctx.Done():
		if a.conn != nil {
			_ = a.conn.Close() // nobody wants it any more
		}
	}
}
