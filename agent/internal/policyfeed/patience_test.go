// While the entries of a node keep changing, every policy comes into force, and what the
// share lacks is denied. What passes by itself is no fault.

package policyfeed

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/agent/internal/datadir"
	"merlon.dev/ca/capb"
	"merlon.dev/policy"
	"merlon.dev/sdk/seal"
)

// churn has a service come and another go at the CA every so often, and the node hear of
// either a moment later, until ctx ends.
func (a *authority) churn(ctx context.Context, every, later time.Duration) {
	for i := 0; ctx.Err() == nil; i++ {
		a.comes(fmt.Sprint("passing-", i))
		a.leaves(fmt.Sprint("passing-", i-2))
		time.AfterFunc(later, func(services []string) func() {
			return func() {
				a.mu.Lock()
				defer a.mu.Unlock()
				a.view = services
			}
		}(a.destinations()))
		time.Sleep(every)
	}
}

// known are the services that the node knows of.
func (a *authority) known() []string {
	a.mu.Lock()
	view := slices.Clone(a.view)
	a.mu.Unlock()
	if view == nil {
		return a.destinations()
	}
	return view
}

func TestEveryGenerationArrivesWhileEntriesKeepChanging(t *testing.T) {
	for name, later := range map[string]time.Duration{"the node hears at once": 0, "the node is behind": 70 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			a := newAuthority(t, "orders", "web")
			dir, err := datadir.Open(filepath.Join(t.TempDir(), "data"), "shop.test", seal.Source{}, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) {
				f, end := a.feed(t, dir)
				changing, rest := context.WithCancel(t.Context())
				done := make(chan struct{})
				go func() { defer close(done); a.churn(changing, 50*time.Millisecond, later) }()
				time.Sleep(time.Second)
				for generation := uint64(1); generation <= 4; generation++ {
					a.mu.Lock()
					a.generation = generation
					a.mu.Unlock()
					announced := a.announcement()
					announced.Generation, announced.Candidate = generation, nil
					f.Announce(announced)
					time.Sleep(time.Second)
					if got, fault := f.Generation(), f.Fault(); got != generation || fault != "" {
						t.Errorf("a second after generation %d was announced: %d is in use, fault %q", generation, got, fault)
					}
					for _, d := range a.known() {
						decided := f.Active().Authorize(t.Context(), &policy.Input{
							Source: "spiffe://shop.test/x", Destination: d, Protocol: policy.HTTP, Method: "GET", Path: "/",
						})
						if granted := !strings.Contains(d, "passing"); decided.Allow != granted {
							t.Errorf("a call to %s: %+v; want it allowed: %t", d, decided, granted)
						}
					}
				}
				if n := a.requests(); n > 4*10 {
					t.Errorf("%d requests in 4 s", n)
				}
				rest()
				<-done
				time.Sleep(time.Second) // the node hears of the last
				end()
			})
		})
	}
}

// A service that stays without its share is a fault, which says so, and is asked for.
func TestShareThatStaysIncompleteIsAFault(t *testing.T) {
	a := newAuthority(t, "orders", "web")
	a.leaves("web")
	dir, err := datadir.Open(filepath.Join(t.TempDir(), "data"), "shop.test", seal.Source{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		a.view = []string{"spiffe://shop.test/orders", "spiffe://shop.test/web"}
		f, end := a.feed(t, dir)
		f.Announce(a.announcement())
		synctest.Wait()
		if f.Generation() != 1 || f.Fault() != "" {
			t.Errorf("at first: generation %d, fault %q; want 1 and none", f.Generation(), f.Fault())
		}
		time.Sleep(patience + time.Second)
		if got, want := f.Fault(), "the CA's share of generation 1 for this node has nothing about spiffe://shop.test/web yet"; !strings.Contains(got, want) {
			t.Errorf("after %s: fault %q; want %q", patience+time.Second, got, want)
		}
		a.comes("web")
		time.Sleep(lastRetry)
		if f.Fault() != "" || !f.Active().For("spiffe://shop.test/web") {
			t.Errorf("once the CA has it: fault %q, policy for %s", f.Fault(), f.Active().Audience())
		}
		end()
	})
}

// A CA whose announcements are late, while its bundle is ahead of them, was not set back:
// the policy is in force, also for services that come meanwhile.
func TestAnnouncementThatIsLateIsNoFault(t *testing.T) {
	a := newAuthority(t, "orders", "web")
	a.leaves("web")
	dir, err := datadir.Open(filepath.Join(t.TempDir(), "data"), "shop.test", seal.Source{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		f, end := a.feed(t, dir)
		a.publishes(3)
		for announced := uint64(1); announced <= 3; announced++ {
			f.Announce(a.announced(announced))
			time.Sleep(time.Minute)
			if f.Generation() != 3 || f.Fault() != "" {
				t.Errorf("%d is announced: generation %d is in use, fault %q; want 3, which the CA has, and none", announced, f.Generation(), f.Fault())
			}
			if announced == 2 {
				a.comes("web")
				f.Need("spiffe://shop.test/web")
				synctest.Wait()
				if !f.Active().For("spiffe://shop.test/web") {
					t.Error("a service that came meanwhile has no policy")
				}
			}
		}
		end()
	})
}

// One that has nothing newer to show was set back, or somebody replays an old policy; a
// replica that catches up within a moment was behind.
func TestCAThatWasSetBackIsAFault(t *testing.T) {
	for name, catchesUp := range map[string]bool{"set back": false, "behind for a moment": true} {
		t.Run(name, func(t *testing.T) {
			a := newAuthority(t, "orders")
			dir, err := datadir.Open(filepath.Join(t.TempDir(), "data"), "shop.test", seal.Source{}, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) {
				f, end := a.feed(t, dir)
				a.publishes(3)
				f.Announce(a.announced(3))
				synctest.Wait()
				a.publishes(2)
				f.Announce(a.announced(2))
				time.Sleep(patience - time.Second)
				if fault := f.Fault(); fault != "" {
					t.Errorf("after a moment: fault %q", fault)
				}
				if catchesUp {
					a.publishes(3)
					f.Announce(a.announced(3))
				}
				time.Sleep(lastRetry)
				if fault := f.Fault(); catchesUp && fault != "" || !catchesUp && !strings.Contains(fault, "the CA's store was set back") {
					t.Errorf("fault %q", fault)
				}
				if f.Generation() != 3 {
					t.Errorf("generation %d is in use; want 3", f.Generation())
				}
				end()
			})
		})
	}
}

// publishes has the CA serve another generation.
func (a *authority) publishes(generation uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.generation = generation
}

// announced is what the CA says of a generation, without a candidate.
func (a *authority) announced(generation uint64) *capb.PolicyBundle {
	pb := a.announcement()
	pb.Generation, pb.Candidate = generation, nil
	return pb
}
