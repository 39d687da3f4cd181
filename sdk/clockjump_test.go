//go:build clockjump

// Services of which one has a clock that jumps by an hour: what they say to each other
// is refused while they cannot agree on what is valid, nothing else is let in, and all
// is well when the clock is right again, or the X509-SVIDs are good by both. It needs a
// package time that can jump: make clocks.

package sdk_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

const clockedEnv = "MERLON_CLOCKED"

func init() { roles = append(roles, runClocked) }

// clocked is a service in a process with a clock of its own.
type clocked struct {
	address string
	in      io.Writer
	out     *bufio.Scanner
}

func startClocked(t *testing.T, td *sdktest.TD, name string) *clocked {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), clockedEnv+"=1", sdk.SocketEnv+"="+td.Address(name))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	c := &clocked{in: in, out: bufio.NewScanner(out)}
	c.address = c.answer(t)
	return c
}

func (c *clocked) answer(t *testing.T) string {
	t.Helper()
	if !c.out.Scan() {
		t.Fatalf("the service has ended: %v", c.out.Err())
	}
	return c.out.Text()
}

func (c *clocked) ask(t *testing.T, format string, args ...any) string {
	t.Helper()
	if _, err := fmt.Fprintf(c.in, format+"\n", args...); err != nil {
		t.Fatal(err)
	}
	return c.answer(t)
}

// runClocked is main of such a process, if this is one.
func runClocked() (itIs bool) {
	if os.Getenv(clockedEnv) == "" {
		return false
	}
	if err := clockedService(); err != nil {
		fmt.Println("error:", err)
	}
	return true
}

func clockedService() error {
	id, err := sdk.Open(context.Background(), quiet, sdk.WithStartupTimeout(time.Minute))
	if err != nil {
		return err
	}
	defer id.Close()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	srv := &http.Server{
		ReadHeaderTimeout: time.Minute, TLSConfig: id.ServerTLS(), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
		Handler: httpauth.Handler(id, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})),
	}
	go srv.ServeTLS(lis, "", "")
	defer srv.Close()
	fmt.Println(lis.Addr())
	kept := make(map[string]*http.Client)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var n int64
		var how, name, address string
		if _, err := fmt.Sscanf(in.Text(), "jump %d", &n); err == nil {
			time.Jump(n)
			fmt.Println("jumped")
			continue
		}
		if _, err := fmt.Sscanf(in.Text(), "%s %s %s", &how, &name, &address); err != nil {
			return err
		}
		if kept[name] == nil {
			kept[name] = &http.Client{Transport: &http.Transport{DialTLSContext: id.DialTLS(sdk.Service(name), "http/1.1")}}
		}
		client := httpauth.Client(id, sdk.Service(name))
		if how == "kept" { // also over a rotation
			client = kept[name]
		}
		fmt.Println(outcome(client, address))
		if how == "new" {
			client.CloseIdleConnections()
		}
	}
	return nil
}

// outcome is "served", "denied" with the reason, or "refused".
func outcome(c *http.Client, address string) string {
	res, err := c.Get("https://" + address + "/")
	if denied, ok := errors.AsType[*sdk.DeniedError](err); ok {
		return "denied " + string(denied.Reason)
	}
	if err != nil {
		return "refused"
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode == http.StatusOK {
		return "served"
	}
	if _, reason, ok := strings.Cut(string(text), `"reason":"`); ok {
		reason, _, _ = strings.Cut(reason, `"`)
		return "denied " + reason
	}
	return "refused"
}

// world is web and orders, who may call each other, and a stranger who may not. The
// clock of orders jumps; that of the trust domain, which the test has, is right.
type world struct {
	*sdktest.TD
	web, orders, stranger *clocked
}

func newWorld(t *testing.T) *world {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	td.Allow("orders", "web")
	td.CompilePolicy()
	return &world{td, startClocked(t, td, "web"), startClocked(t, td, "orders"), startClocked(t, td, "stranger")}
}

// expect has the calls made, kept ones on connections that are open, and compares:
// each want may have several outcomes, separated by "|".
func (w *world) expect(t *testing.T, when, in, keptIn, out, keptOut string) {
	t.Helper()
	calls := map[string]struct {
		from     *clocked
		how, to  string
		address  string
		outcomes string
	}{
		"web to orders":       {w.web, "new", "orders", w.orders.address, in},
		"web to orders, kept": {w.web, "kept", "orders", w.orders.address, keptIn},
		"orders to web":       {w.orders, "new", "web", w.web.address, out},
		"orders to web, kept": {w.orders, "kept", "web", w.web.address, keptOut},
		"stranger to orders":  {w.stranger, "new", "orders", w.orders.address, "denied NO_GRANT|refused"},
	}
	got := make(map[string]string)
	right := func() bool {
		for name, call := range calls {
			got[name] = call.from.ask(t, "%s %s %s", call.how, call.to, call.address)
			if name == "stranger to orders" && got[name] == "served" {
				t.Fatalf("%s: the stranger was served", when)
			}
		}
		for name, call := range calls {
			if !strings.Contains("|"+call.outcomes+"|", "|"+got[name]+"|") {
				return false
			}
		}
		return true
	}
	for deadline := time.Now().Add(30 * time.Second); !right(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v; want %v", when, got, calls)
		}
	}
	t.Logf("%s: %v", when, got)
}

// notServed has web call orders, whose clock says that both X509-SVIDs have ended, at
// once, on the connection that is open.
func (w *world) notServed(t *testing.T) {
	t.Helper()
	got := w.web.ask(t, "kept orders %s", w.orders.address)
	t.Logf("at once: %s", got)
	if got != "denied EXPIRED" && got != shut { // shut: the table was swept in between
		t.Errorf("%s, at once after X509-SVIDs have ended", got)
	}
}

const okay, shut, over = "served", "refused", "denied EXPIRED|refused"

func TestClockJumpsForward(t *testing.T) {
	w := newWorld(t)
	w.expect(t, "before", okay, okay, okay, okay)
	w.orders.ask(t, "jump 3600")
	w.notServed(t)
	w.expect(t, "an hour ahead", shut, over, shut, over)
	w.Rotate("web")
	w.Rotate("orders")
	w.expect(t, "an hour ahead, with X509-SVIDs of an hour", shut, shut, shut, shut)
	w.SetTTL(4 * time.Hour)
	w.Rotate("web")
	w.Rotate("orders")
	w.expect(t, "an hour ahead, with X509-SVIDs of four hours", okay, okay, okay, okay)
	w.Deny("web", "orders")
	w.expect(t, "denied", "denied DENY_RULE", "denied DENY_RULE", okay, okay)
	w.Forget("web", "orders")
	w.Allow("web", "orders")
	w.orders.ask(t, "jump 0")
	w.expect(t, "right again", okay, okay, okay, okay)
}

func TestClockJumpsForwardAndBack(t *testing.T) {
	w := newWorld(t)
	w.expect(t, "before", okay, okay, okay, okay)
	w.orders.ask(t, "jump 3600")
	w.notServed(t)
	w.expect(t, "an hour ahead", shut, over, shut, over)
	w.orders.ask(t, "jump 0")
	w.expect(t, "right again", okay, okay, okay, okay) // with the same X509-SVIDs
}

func TestClockJumpsBack(t *testing.T) {
	w := newWorld(t)
	w.expect(t, "before", okay, okay, okay, okay)
	w.orders.ask(t, "jump -3600")
	// Nothing has begun yet by that clock, but what is open was proved before.
	w.expect(t, "an hour behind", shut, okay, shut, okay)
	w.Rotate("web")
	w.Rotate("orders")
	w.expect(t, "an hour behind, with new X509-SVIDs", shut, okay, shut, okay)
	w.Deny("web", "orders")
	w.expect(t, "denied", shut, "denied DENY_RULE", shut, okay)
	w.Revoke("web")
	w.expect(t, "revoked", shut, shut, shut, shut)
	w.Forget("web", "orders")
	w.Allow("web", "orders")
	w.Rotate("web")
	w.orders.ask(t, "jump 0")
	w.expect(t, "right again", okay, okay, okay, okay)
}
