// The pair of real Envoys under calls that do not stop: rotation, revocation, a change
// of policy, an SDS name that stands for nothing, an agent that is killed. Calls fail
// where that is the point, and none is ever allowed wrongly.

package envoy_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/integration/stage"
)

// load calls orders as web: what the policy allows, and what it never does.
type load struct {
	p *pair
	// may are the statuses that an allowed call may get now.
	may    atomic.Pointer[[]int]
	calls  atomic.Int64
	last   atomic.Int64 // status of the newest allowed call
	failed atomic.Int64
}

const loadPace = 40 * time.Millisecond

// start calls until stop is called.
func (p *pair) load() (l *load, stop func()) {
	l = &load{p: p}
	l.expect(http.StatusOK)
	ctx, cancel := context.WithCancel(p.t.Context())
	var running sync.WaitGroup
	for range 2 {
		running.Go(func() {
			client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{}} // keeps its connection
			defer client.CloseIdleConnections()
			for pace := time.NewTicker(loadPace); ; {
				select {
				case <-ctx.Done():
					pace.Stop()
					return
				case <-pace.C:
				}
				l.round(client)
			}
		})
	}
	stop = func() { cancel(); running.Wait() }
	p.t.Cleanup(stop)
	return l, stop
}

// expect says what allowed calls may get from now on.
func (l *load) expect(statuses ...int) { l.may.Store(&statuses) }

// round makes a call that the policy allows, and two that it never does.
func (l *load) round(client *http.Client) {
	l.calls.Add(3)
	before := l.may.Load()
	status, body, err := call(client, l.p.web.inbound, http.MethodGet, "/orders/1")
	after := l.may.Load()
	if err != nil {
		l.fail("an allowed call: %v", err) // web's Envoy is there all the time
	} else if !slices.Contains(*before, status) && !slices.Contains(*after, status) {
		l.fail("an allowed call gets %d %q; want one of %v", status, body, *after)
	}
	l.last.Store(int64(status))
	for method, path := range map[string]string{http.MethodPost: "/orders/1", http.MethodGet: "/admin"} {
		status, body, err := call(client, l.p.web.inbound, method, path)
		if err != nil || status < 400 {
			l.fail("%s %s, which no policy ever allows, gets %d %q, %v", method, path, status, body, err)
		}
	}
}

func (l *load) fail(format string, args ...any) {
	if l.failed.Add(1) <= 10 {
		l.p.t.Errorf(format, args...)
	}
}

func call(client *http.Client, address, method, path string) (status int, body string, err error) {
	req, err := http.NewRequest(method, "http://"+address+path, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}

// reaches waits until allowed calls get status, and demands it of them all from then on.
func (l *load) reaches(what string, status int) {
	l.p.t.Helper()
	stage.Eventually(l.p.t, what, func() error {
		if got := l.last.Load(); got != int64(status) {
			return fmt.Errorf("allowed calls get %d; want %d", got, status)
		}
		return nil
	})
	l.expect(status)
}

// denies waits until calls are denied, and checks with one of its own why.
func (l *load) denies(what, reason string) {
	l.p.t.Helper()
	l.reaches(what, http.StatusForbidden)
	got, err := l.p.get("/orders/1")
	if err != nil || got.status != http.StatusForbidden || !strings.Contains(got.body, `"reason":"`+reason+`"`) {
		l.p.t.Errorf("%s: %+v, %v; want %s", what, got, err, reason)
	}
}

// rotates replaces the root, and with it every SVID.
func (p *pair) rotates() {
	p.t.Helper()
	shown := p.orders.shown(p.t)
	stage.RotateRoot(p.d, func() {})
	stage.Eventually(p.t, "orders shows another SVID", func() error {
		if p.orders.shown(p.t) == shown {
			return errors.New("the same")
		}
		return nil
	})
}

func TestEnvoyPairUnderLoad(t *testing.T) {
	t.Parallel()
	// So that a revoked connection is soon followed by one with the next SVID.
	p := startPair(t, "max_connection_duration: 60s", "max_connection_duration: 2s")
	l, stop := p.load()
	begun := time.Now()

	// Rotation: every SVID and the root are replaced, and no call notices.
	p.rotates()

	// Policy: off and on again.
	l.expect(http.StatusOK, http.StatusForbidden)
	p.push("", "[GET]", "[PUT]")
	l.denies("the policy does not allow it any more", "METHOD")
	l.expect(http.StatusOK, http.StatusForbidden)
	p.push("")
	l.reaches("the policy allows it again", http.StatusOK)

	// Revocation of what web shows: denied while it is shown, and no longer.
	l.expect(http.StatusOK, http.StatusForbidden)
	p.d.Merlon("revoke", "--spiffe-id", p.d.ID("/web"))
	l.reaches("what is revoked is denied", http.StatusForbidden)
	l.expect(http.StatusOK, http.StatusForbidden)
	l.reaches("the next SVID is good", http.StatusOK)
	// And of its entry: there is no next one.
	l.expect(http.StatusOK, http.StatusForbidden)
	p.d.Merlon("entry", "delete", p.webEntry)
	l.denies("the SVID of a deleted entry is denied", "REVOKED")
	// Its last SVID may end meanwhile, and then there is no connection.
	l.expect(http.StatusOK, http.StatusForbidden, http.StatusServiceUnavailable)
	p.webEntry = p.entry("/web", p.web)
	l.reaches("calls pass with the new entry", http.StatusOK)

	// A name that stands for nothing is another Envoy's trouble.
	nobody := &envoy{t: t, binary: p.orders.binary, inbound: fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)), admin: fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))}
	nobody.run(envoyConfigOf(t, envoyDir+"orders.yaml", "spiffe://shop.test/orders\n", "spiffe://shop.test/nobody\n",
		"/run/merlon/agent/public/api.sock", strings.TrimPrefix(p.d.WorkloadAPI, "unix://"),
		"port_value: 8443}", portOf(nobody.inbound), "port_value: 9901}", portOf(nobody.admin), "port_value: 8080}", portOf(p.app.http)))
	(&gateways{t: t, d: p.d}).logged("SDS names stand for nothing", p.d.ID("/nobody"))

	// The agent is killed: nothing passes that it was not asked about, and all is well
	// when it is back.
	l.expect(http.StatusOK, http.StatusServiceUnavailable)
	p.d.Agent.Kill()
	l.reaches("nobody answers Envoy", http.StatusServiceUnavailable)
	l.expect(http.StatusOK, http.StatusServiceUnavailable)
	p.d.Agent.Restart()
	l.reaches("the agent answers again", http.StatusOK)
	p.rotates()

	// The Envoy that asks is nobody's any more.
	l.expect(http.StatusOK, http.StatusForbidden)
	p.d.Merlon("entry", "delete", p.ordersEntry)
	l.denies("an Envoy without an entry lets nobody in", "AGENT_UNAVAILABLE")

	stop()
	saw := p.app.calls.Load()
	t.Logf("%d calls in %s, of which the app saw %d", l.calls.Load(), time.Since(begun).Round(time.Second), saw)
	if n := p.app.wrong.Load(); n != 0 {
		t.Errorf("the app saw %d calls that no policy ever allows", n)
	}
}
