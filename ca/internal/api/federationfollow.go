// Trust bundles that come by themselves: the leading replica follows each source on a
// schedule of its own, as often as its last document hinted at, so that one that hangs
// keeps nobody else waiting. And it says which keys several of them have.

package api

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/federation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

const (
	// followLook is how often it is looked whom there is to follow.
	followLook = 5 * time.Second
	// judgingAtOnce is how many documents are judged at a time. What waits for the
	// other side costs a connection and a document, and waits beside each other:
	// there are at most trust.MaxFederated.
	judgingAtOnce = 2
)

// pollers are the sources that are followed, each by a goroutine. They belong to one.
type pollers struct {
	service *Service
	running map[spiffeid.TrustDomain]poller
	done    sync.WaitGroup
	// said is the error that the log has, told the shared keys that it has, of the
	// trust bundles own and judged.
	said   string
	told   map[string]bool
	own    *trust.Bundle
	judged []*trust.Federated
}

type poller struct {
	set  time.Time // of which source
	stop context.CancelFunc
}

// FollowFederations fetches trust bundles as they are due, until ctx ends.
func (s *Service) FollowFederations(ctx context.Context) {
	ctx, stop := context.WithCancel(ctx)
	p := pollers{service: s, running: make(map[spiffeid.TrustDomain]poller)}
	defer p.done.Wait()
	defer stop()
	look := time.NewTicker(followLook)
	defer look.Stop()
	for {
		p.look(ctx)
		p.sayShared(ctx)
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
	}
}

// look begins with sources that are new or were set anew, and ends with those that were
// removed, also in the midst of a fetch.
func (p *pollers) look(ctx context.Context) {
	kvs, err := p.service.listUnder(ctx, federation.SourcePrefix)
	if err != nil {
		p.say(ctx, err)
		return
	}
	var unreadable error
	there := make(map[spiffeid.TrustDomain]bool)
	for _, kv := range kvs {
		src, err := federation.DecodeSource(kv)
		if err != nil { // the others are looked after all the same
			unreadable = errors.Join(unreadable, err)
			continue
		}
		there[src.TrustDomain] = true
		if running, ok := p.running[src.TrustDomain]; !ok || !running.set.Equal(src.SetAt) {
			p.follow(ctx, src)
		}
	}
	for td, running := range p.running {
		if !there[td] {
			running.stop()
			delete(p.running, td)
			p.service.metrics.forget(td)
		}
	}
	p.say(ctx, unreadable)
}

func (p *pollers) follow(ctx context.Context, src *federation.Source) {
	if before, ok := p.running[src.TrustDomain]; ok {
		before.stop()
	}
	ctx, stop := context.WithCancel(ctx)
	p.running[src.TrustDomain] = poller{src.SetAt, stop}
	p.done.Go(func() {
		defer stop()
		p.service.followSource(ctx, src)
	})
}

// followSource fetches from src as it is due, until ctx ends.
func (s *Service) followSource(ctx context.Context, src *federation.Source) {
	wait := src.Due(time.Now())
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = federation.PollLeast                                                 // where it cannot even be tried
		if outcome, _ := s.fetch(ctx, src.TrustDomain); !outcome.TriedAt.IsZero() { // the error is written down
			wait = jittered(outcome.Interval())
		}
	}
}

// jittered is d give or take a tenth.
func jittered(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.9 + 0.2*rand.Float64())) //nolint:gosec // no secret
}

// say logs an error once. Where the store does not work, /ready says so.
func (p *pollers) say(ctx context.Context, err error) {
	switch {
	case err == nil:
		p.said = ""
	case ctx.Err() != nil || errors.Is(err, store.ErrReadOnly) || errors.Is(err, store.ErrUnavailable) || err.Error() == p.said:
	default:
		p.said = err.Error()
		p.service.opts.Log.LogAttrs(ctx, slog.LevelError, "federated trust bundles not all looked after", slog.Any("err", err))
	}
}

// sayShared logs each key that vouches for several trust domains, once.
func (p *pollers) sayShared(ctx context.Context) {
	own, all := p.service.registry.Trust(), p.service.registry.Federated()
	if own == p.own && slices.Equal(all, p.judged) {
		return
	}
	p.own, p.judged = own, all
	told := make(map[string]bool)
	for _, k := range p.service.registry.SharedKeys() {
		var names []string
		for _, td := range k.TrustDomains {
			names = append(names, td.Name())
		}
		text := k.What + " " + strings.Join(names, " ")
		if told[text] = true; !p.told[text] {
			p.service.opts.Log.LogAttrs(ctx, slog.LevelError, "one key is in the trust bundles of several trust domains, and vouches for each",
				slog.Any("federated_trust_domains", names), slog.String("key", k.What))
		}
	}
	p.told = told
}
