// Following other trust domains: each on its own, whatever becomes of another.

package api

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/federation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid/forge"
)

// served is a https_web endpoint, and the source that an administrator would name.
func served(t *testing.T, td string, handler http.HandlerFunc) *federation.Source {
	t.Helper()
	srv := httptest.NewUnstartedServer(handler)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return &federation.Source{
		TrustDomain: spiffeid.RequireTrustDomainFromString(td), URL: srv.URL, Profile: federation.Web, SetAt: time.Now(),
		Authorities: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})),
	}
}

// keep writes what somebody else has kept.
func keep(t *testing.T, s *Service, ops ...store.Op) {
	t.Helper()
	res, err := s.opts.Store.Txn(t.Context(), nil, ops, nil)
	if err == nil {
		err = s.registry.Wait(t.Context(), res.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func keepSources(t *testing.T, s *Service, sources ...*federation.Source) {
	t.Helper()
	for _, src := range sources {
		op, err := src.Put()
		if err != nil {
			t.Fatal(err)
		}
		keep(t, s, op)
	}
}

func asAdmin(t *testing.T) context.Context {
	return context.WithValue(t.Context(), callerKey{}, &Caller{Name: "test"})
}

// eventually waits until check has nothing to say.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("%s: still %v", what, err)
}

// logTo has s log into what is returned.
func logTo(s *Service) *lines {
	text := &lines{}
	s.opts.Log = slog.New(slog.NewTextHandler(text, nil))
	return text
}

type lines struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), what)
}

// follow has s follow until stop is called, or the test ends.
func follow(t *testing.T, s *Service) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.FollowFederations(ctx)
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	t.Cleanup(stop)
	return stop
}

func TestUnreadableSourceStopsNothing(t *testing.T) {
	s, _ := newService(t)
	logged, ctx := logTo(s), asAdmin(t)
	asked := make(chan struct{}, 8)
	good := served(t, "good.test", func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		fmt.Fprint(w, `{"keys":[],"spiffe_sequence":1}`)
	})
	keep(t, s, store.Put(federation.SourcePrefix+"aaa.test", []byte(`{"v":2}`)))
	keepSources(t, s, good)
	follow(t, s)
	<-asked
	eventually(t, "it is logged", func() error {
		if logged.count("aaa.test") == 0 {
			return errors.New("not a word")
		}
		return nil
	})
	list, err := s.ListFederatedBundles(ctx, &capb.ListFederatedBundlesRequest{})
	if err != nil || len(list.GetFederatedBundles()) != 2 || list.GetFederatedBundles()[0].GetHealth().GetTheirs() != "failing" ||
		!strings.Contains(list.GetFederatedBundles()[0].GetSource().GetFailure(), "cannot be read") {
		t.Errorf("%v, %v; want the unreadable one, with why", list, err)
	}
	if _, err := s.RemoveFederatedBundle(ctx, &capb.RemoveFederatedBundleRequest{TrustDomain: "aaa.test"}); err != nil {
		t.Errorf("remove what cannot be read: %v", err)
	}
}

// Any number of sources that hang keep nobody else waiting, and end with their following.
func TestSourcesThatHangDelayNobody(t *testing.T) {
	s, _ := newService(t)
	hanging := make(chan struct{}, 64)
	for i := range cap(hanging) {
		keepSources(t, s, served(t, fmt.Sprintf("a%d.test", i), func(_ http.ResponseWriter, r *http.Request) {
			hanging <- struct{}{}
			<-r.Context().Done()
		}))
	}
	good := served(t, "good.test", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"keys":[],"spiffe_sequence":1}`) })
	stop := follow(t, s)
	for range cap(hanging) {
		<-hanging // none of them can have been given up: FetchTimeout is longer than this takes
	}
	keepSources(t, s, good)
	eventually(t, "the trust bundle of good.test", func() error {
		_, _, err := s.heldFederated(t.Context(), good.TrustDomain)
		return err
	})
	for i := range cap(hanging) {
		td := fmt.Sprintf("a%d.test", i)
		if b, err := s.describeFederated(t.Context(), spiffeid.RequireTrustDomainFromString(td)); err != nil || b.GetSource().GetTriedAt() != nil {
			t.Errorf("%s: %v, %v; want it not to have ended before good.test was served", td, b, err)
		}
	}
	stop()
}

// What is removed while it is fetched stays removed, whoever fetches, and the fetch of the
// one who follows ends.
func TestRemovedWhileItIsFetched(t *testing.T) {
	for what, again := range map[string]bool{"removed": false, "removed, and set anew": true} {
		t.Run(what, func(t *testing.T) {
			s, _ := newService(t)
			ctx := asAdmin(t)
			asked, removed := make(chan struct{}), make(chan struct{})
			src := served(t, "partner.test", func(w http.ResponseWriter, _ *http.Request) {
				asked <- struct{}{}
				<-removed
				fmt.Fprint(w, `{"keys":[],"spiffe_sequence":1}`)
			})
			keepSources(t, s, src)
			fetched := make(chan error, 1)
			go func() {
				_, err := s.fetch(t.Context(), src.TrustDomain)
				fetched <- err
			}()
			<-asked
			if _, err := s.RemoveFederatedBundle(ctx, &capb.RemoveFederatedBundleRequest{TrustDomain: "partner.test"}); err != nil && !errors.Is(err, trust.ErrNoFederated) {
				t.Fatal(err)
			}
			if again {
				src.URL += "/elsewhere"
				keepSources(t, s, src)
			}
			close(removed)
			if err := <-fetched; err != nil {
				t.Errorf("the fetch: %v", err)
			}
			if b, _, err := s.heldFederated(ctx, src.TrustDomain); !errors.Is(err, trust.ErrNoFederated) {
				t.Errorf("what was removed is back: %+v, %v", b, err)
			}
			kv, _, err := s.opts.Store.Get(ctx, federation.SourcePrefix+"partner.test")
			if again {
				if got, decodeErr := federation.DecodeSource(kv); decodeErr != nil || got.URL != src.URL || !got.TriedAt.IsZero() {
					t.Errorf("the new source: %+v, %v; want it untouched", got, err)
				}
			} else if !errors.Is(err, store.ErrNotFound) {
				t.Errorf("the source is back: %s, %v", kv.Value, err)
			}
		})
	}
}

func TestRemovalEndsTheFetch(t *testing.T) {
	s, _ := newService(t)
	asked, left := make(chan struct{}), make(chan struct{})
	keepSources(t, s, served(t, "partner.test", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, `{"keys":`)
		w.(http.Flusher).Flush()
		close(asked)
		<-r.Context().Done()
		close(left)
	}))
	ctx, cancel := context.WithCancel(t.Context())
	p := pollers{service: s, running: make(map[spiffeid.TrustDomain]poller)}
	defer p.done.Wait()
	defer cancel()
	p.look(ctx)
	<-asked
	if _, err := s.RemoveFederatedBundle(asAdmin(t), &capb.RemoveFederatedBundleRequest{TrustDomain: "partner.test"}); err != nil {
		t.Fatal(err)
	}
	p.look(ctx)
	<-left
	p.done.Wait() // although ctx goes on
	if len(p.running) != 0 {
		t.Errorf("still followed: %v", p.running)
	}
}

// A failure is logged when it begins and when it becomes another one, not for each port
// that a connection had; keys that do not count are named once, and kept for status.
func TestFailuresAndIgnoredKeysAreLoggedOnce(t *testing.T) {
	s, _ := newService(t)
	logged := logTo(s)
	answer := `{"keys":[{"kty":"EC","use":"sig"}],"spiffe_sequence":1}`
	var status atomic.Int64
	src := served(t, "partner.test", func(w http.ResponseWriter, r *http.Request) {
		switch code := int(status.Load()); code {
		case 0:
			fmt.Fprint(w, answer)
		case -1: // the error says from which port to which
			panic(http.ErrAbortHandler)
		default:
			w.WriteHeader(code)
		}
	})
	keepSources(t, s, src)
	fetch := func(next int) {
		status.Store(int64(next))
		_, _ = s.fetch(t.Context(), src.TrustDomain) // the log is what is asked about
	}
	for _, step := range []struct {
		status           int
		failing, ignored int
	}{{0, 0, 1}, {0, 0, 1}, {-1, 1, 1}, {-1, 1, 1}, {-1, 1, 1}, {500, 2, 1}, {503, 2, 1}, {0, 2, 1}, {500, 3, 1}} {
		fetch(step.status)
		if failing, ignored := logged.count("not fetched"), logged.count("ignored="); failing != step.failing || ignored != step.ignored {
			t.Errorf("%d: %d failures and %d times ignored keys are in the log; want %d and %d", step.status, failing, ignored, step.failing, step.ignored)
		}
	}
	b, err := s.describeFederated(t.Context(), src.TrustDomain)
	if err != nil || len(b.GetSource().GetIgnored()) != 1 || !strings.Contains(b.GetSource().GetIgnored()[0], `use "sig"`) || b.GetSource().GetReason() != federation.BadStatus {
		t.Errorf("%v, %v; want the ignored key and the reason", b, err)
	}
}

// A key in the trust bundles of two others: whichever comes first, both are taken, both
// are named, in the log once; the own trust domain's are refused to everybody.
func TestKeyOfTwoTrustDomainsIsAnAlarm(t *testing.T) {
	victim := forge.New(t, "victim.test")
	keys := victim.Bundle().JWTBundle()
	for name, order := range map[string][]string{"the copier first": {"copier.test", "victim.test"}, "the holder first": {"victim.test", "copier.test"}} {
		t.Run(name, func(t *testing.T) {
			s, _ := newService(t)
			logged, ctx := logTo(s), asAdmin(t)
			text, err := keys.Marshal() // of JWT keys nobody can say whose they are
			if err != nil {
				t.Fatal(err)
			}
			text = bytes.Replace(text, []byte(`{"keys":[{`), []byte(`{"keys":[{"use":"jwt-svid",`), 1)
			p := pollers{service: s}
			for i, td := range order {
				req := &capb.SetFederatedBundleRequest{TrustDomain: td, Document: text}
				if i > 0 { // a person may have taken the wrong file
					_, err := s.SetFederatedBundle(ctx, req)
					if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), order[0]) {
						t.Errorf("handed over: %v; want a refusal that names %s", err, order[0])
					}
					req.Force = true
				}
				if _, err := s.SetFederatedBundle(ctx, req); err != nil {
					t.Fatalf("%s: %v", td, err)
				}
				for range 2 {
					p.sayShared(ctx)
				}
				if got := logged.count("vouches for each"); got != i {
					t.Errorf("after %s the log has %d alarms; want %d", td, got, i)
				}
			}
			list, err := s.ListFederatedBundles(ctx, &capb.ListFederatedBundlesRequest{})
			if err != nil || len(list.GetFederatedBundles()) != 2 {
				t.Fatalf("%v, %v", list, err)
			}
			for i, other := range []string{"victim.test", "copier.test"} {
				b := list.GetFederatedBundles()[i]
				if problems := strings.Join(b.GetHealth().GetProblems(), ";"); len(b.GetJwtKeyIds()) != 1 || !strings.Contains(problems, other) {
					t.Errorf("%v; want its key, and %s named", b, other)
				}
			}
		})
	}
}

// That a trust bundle changed, or was emptied, is in the log also where the fetch before
// failed: whoever empties one may take its endpoint away first.
func TestChangeAfterAFailureIsLogged(t *testing.T) {
	s, _ := newService(t)
	logged := logTo(s)
	partner := forge.New(t, "partner.test").Bundle()
	answer := func(sequence uint64, empty bool) string {
		if empty {
			return fmt.Sprintf(`{"keys":[],"spiffe_sequence":%d}`, sequence)
		}
		partner.SetSequenceNumber(sequence)
		text, err := partner.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	var text atomic.Pointer[string]
	src := served(t, "partner.test", func(w http.ResponseWriter, _ *http.Request) {
		if text := text.Load(); text != nil {
			fmt.Fprint(w, *text)
			return
		}
		w.WriteHeader(http.StatusInternalServerError)
	})
	keepSources(t, s, src)
	for i, step := range []struct {
		text                    string // none: a failure
		again, changed, emptied int
	}{
		{answer(1, false), 0, 1, 0}, {"", 0, 1, 0}, {answer(1, false), 1, 1, 0}, {"", 1, 1, 0}, {answer(2, false), 2, 2, 0}, {"", 2, 2, 0}, {answer(3, true), 3, 2, 1},
	} {
		text.Store(nil)
		if step.text != "" {
			text.Store(&step.text)
		}
		_, _ = s.fetch(t.Context(), src.TrustDomain) // the log is what is asked about
		if again, changed, emptied := logged.count("fetched again"), logged.count("bundle changed"), logged.count("emptied"); again != step.again || changed != step.changed || emptied != step.emptied {
			t.Errorf("step %d: fetched again %d times, changed %d, emptied %d in the log; want %+v", i, again, changed, emptied, step)
		}
	}
}
