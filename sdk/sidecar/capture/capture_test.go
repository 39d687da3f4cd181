// Capture in network namespaces, by both backends: who is captured and who is not, that
// the app is reached by nobody else, and that nothing of others' rules changes.

package capture

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Users of the tests.
const sidecarUser, appUser, agentUser, otherUser = 4242, 1000, 1001, 1002

// Ports of the tests.
const (
	outboundPort, inboundPort = 15001, 8443
	appPort, farPort          = 8080, 80
)

func rules() Rules {
	return Rules{
		SidecarUID: sidecarUser, OutboundPort: outboundPort, Inbound: []Inbound{{appPort, inboundPort}}, ExcludeUIDs: []uint32{agentUser},
		ExcludeNets: []netip.Prefix{netip.MustParsePrefix("10.99.9.0/24"), netip.MustParsePrefix("fd99:0:0:9::/64")}, UDP: UDPDNS,
	}
}

// backends are the tests' subtests, with what they need.
var backends = map[string][]string{
	NFTables: {"nft:nftables"},
	IPTables: {"iptables-restore:iptables", "ip6tables-restore:iptables"},
}

// world is a machine with an app, a sidecar and a server far away.
type world struct {
	t                  *testing.T
	backend            string
	here, there        *machine
	stopOut4, stopOut6 func()
	stopIn             func()
}

func newWorld(t *testing.T, backend string) *world {
	t.Helper()
	w := &world{t: t, backend: backend}
	w.here, w.there = machines(t)
	// Excluded networks that are there all the same.
	ip(t, "route", "add", "10.99.9.0/24", "via", w.there.v4)
	ip(t, "-6", "route", "add", "fd99:0:0:9::/64", "via", w.there.v6)
	w.there.as(0, func() error {
		ip(t, "addr", "add", "10.99.9.2/24", "dev", "lo")
		ip(t, "addr", "add", "fd99:0:0:9::2/64", "dev", "lo", "nodad")
		return nil
	})
	w.there.serve("", farPort, always("far"))
	w.here.serve("", appPort, always("app"))
	meant := func(conn *net.TCPConn) string {
		to, err := OriginalDst(conn)
		if err != nil {
			return err.Error()
		}
		return "sidecar for " + to.String()
	}
	w.stopOut4, w.stopOut6 = w.here.serve("127.0.0.1", outboundPort, meant), w.here.serve("::1", outboundPort, meant)
	w.stopIn = w.here.serve("", inboundPort, func(conn *net.TCPConn) string {
		to, err := OriginalDst(conn)
		if err != nil {
			return "callers, " + err.Error()
		}
		return "callers of " + to.String()
	})
	return w
}

func (w *world) install(r Rules) {
	w.t.Helper()
	if name, err := Install(w.t.Context(), w.backend, r); err != nil || name != w.backend {
		w.t.Fatalf("Install() = %s, %v; want %s", name, err, w.backend)
	}
}

// want dials from a machine, and compares what answers.
func (w *world) want(from *machine, uid int, host string, port int, want string) {
	w.t.Helper()
	if got := from.dial(uid, host, port); got != want {
		w.t.Errorf("as user %d to %s port %d: %q; want %q", uid, host, port, got, want)
	}
}

func forBackends(t *testing.T, test func(*testing.T, string)) {
	for backend, tools := range backends {
		t.Run(backend, func(t *testing.T) {
			t.Parallel() // each in a process of its own
			if inside(t, tools...) {
				test(t, backend)
			}
		})
	}
}

func TestCapture(t *testing.T) {
	forBackends(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend)
		w.want(w.here, appUser, w.there.v4, farPort, "far")
		w.want(w.there, 0, w.here.v4, appPort, "app")
		others(t, backend) // so that the kernel follows connections already
		before := w.there.open(0, w.here.v4, appPort)
		if line := readLine(before, 5*time.Second); line != "app" {
			t.Fatalf("before, the app says %q", line)
		}
		w.install(rules())
		for _, host := range []string{w.there.v4, w.there.v6} {
			far := "sidecar for " + netip.AddrPortFrom(netip.MustParseAddr(host), farPort).String()
			w.want(w.here, appUser, host, farPort, far)
			w.want(w.here, otherUser, host, farPort, far)
			w.want(w.here, 0, host, farPort, far)
			w.want(w.here, sidecarUser, host, farPort, "far")
			w.want(w.here, agentUser, host, farPort, "far")
		}
		for _, host := range []string{"10.99.9.2", "fd99:0:0:9::2"} { // an excluded network
			w.want(w.here, appUser, host, farPort, "far")
		}
		for _, host := range []string{"127.0.0.1", "::1", w.here.v4, w.here.v6} { // what stays here
			w.want(w.here, appUser, host, appPort, "app")
			w.want(w.here, sidecarUser, host, appPort, "app")
		}
		for _, host := range []string{"127.0.0.1", "::1"} { // nobody wanted to go there
			w.want(w.here, appUser, host, outboundPort, ErrNotCaptured.Error())
		}
		// T35: from another machine nobody comes to the app but through the sidecar.
		for _, host := range []string{w.here.v4, w.here.v6} {
			w.want(w.there, 0, host, appPort, "callers of "+netip.AddrPortFrom(netip.MustParseAddr(host), appPort).String())
			w.want(w.there, 0, host, inboundPort, "callers, "+ErrNotCaptured.Error())
		}
		// Nor by a connection from before.
		before.Write([]byte("still there?\n"))
		if line := readLine(before, 500*time.Millisecond); line != silent {
			t.Errorf("on a connection from before there is %q; want nothing", line)
		}
		before.Close()
		w.failsClosed()
	})
}

// failsClosed stops the sidecar: nothing goes past it then.
func (w *world) failsClosed() {
	w.t.Helper()
	w.stopOut4()
	w.stopOut6()
	w.stopIn()
	for _, host := range []string{w.there.v4, w.there.v6} {
		w.want(w.here, appUser, host, farPort, refused)
		w.want(w.here, sidecarUser, host, farPort, "far")
	}
	for _, host := range []string{w.here.v4, w.here.v6} {
		w.want(w.there, 0, host, appPort, refused)
	}
}

func TestOnlyTheAppsUserIsCaptured(t *testing.T) {
	forBackends(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend)
		r := rules()
		r.AppUIDs, r.ExcludeUIDs = []uint32{appUser, agentUser}, nil
		w.install(r)
		for _, host := range []string{w.there.v4, w.there.v6} {
			far := "sidecar for " + netip.AddrPortFrom(netip.MustParseAddr(host), farPort).String()
			w.want(w.here, appUser, host, farPort, far)
			w.want(w.here, agentUser, host, farPort, far)
			w.want(w.here, otherUser, host, farPort, "far")
			w.want(w.here, 0, host, farPort, "far")
		}
	})
}

// sendUDP sends a datagram as a user, and says whether it arrives.
func (w *world) sendUDP(uid int, host string, port int) bool {
	w.t.Helper()
	var lis net.PacketConn
	err := w.there.as(0, func() (err error) {
		lis, err = net.ListenPacket("udp", net.JoinHostPort(host, "0"))
		if port != 0 {
			lis.Close()
			lis, err = net.ListenPacket("udp", net.JoinHostPort(host, "53"))
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	defer lis.Close()
	err = w.here.as(uid, func() error {
		conn, err := net.Dial("udp", lis.LocalAddr().String())
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write([]byte("x"))
		return err
	})
	if errors.Is(err, syscall.EPERM) {
		return false // the kernel says so at once
	}
	if err != nil {
		w.t.Fatal(err)
	}
	lis.SetReadDeadline(time.Now().Add(5 * time.Second))
	_, _, err = lis.ReadFrom(make([]byte, 1))
	return err == nil
}

func TestUDP(t *testing.T) {
	forBackends(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend)
		for _, mode := range []UDP{UDPAllow, UDPDNS, UDPDrop} {
			r := rules()
			r.UDP = mode
			w.install(r)
			for _, host := range []string{w.there.v4, w.there.v6} {
				if got := w.sendUDP(appUser, host, 0); got != (mode == UDPAllow) {
					t.Errorf("%s: a datagram to %s passes: %v", mode, host, got)
				}
				if got := w.sendUDP(appUser, host, 53); got != (mode != UDPDrop) {
					t.Errorf("%s: a question to the resolver at %s passes: %v", mode, host, got)
				}
				if !w.sendUDP(sidecarUser, host, 0) || !w.sendUDP(agentUser, host, 0) {
					t.Errorf("%s: a datagram of the sidecar or the agent does not pass", mode)
				}
			}
		}
	})
}

// ruleset is all that the kernel has, of whomever, without counters.
func ruleset(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, command := range [][]string{{"nft", "-s", "list", "ruleset"}, {"iptables-save"}, {"ip6tables-save"}} {
		if _, err := exec.LookPath(command[0]); err != nil {
			continue
		}
		out, err := exec.Command(command[0], command[1:]...).Output()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(out)) {
			if !strings.HasPrefix(line, "#") {
				all.WriteString(line)
			}
		}
	}
	return all.String()
}

// others makes rules as others have them, in the tables and hooks that we use.
func others(t *testing.T, backend string) {
	t.Helper()
	commands := []string{
		"nft add table inet other",
		"nft add chain inet other o { type nat hook output priority -100; }",
		"nft add rule inet other o tcp dport 99 redirect to :100",
	}
	if backend == IPTables {
		commands = []string{
			"iptables -t nat -A OUTPUT -p tcp --dport 99 -j REDIRECT --to-ports 100",
			"iptables -A INPUT -p tcp --dport 7 -j DROP",
			"ip6tables -t nat -A PREROUTING -p tcp --dport 99 -j REDIRECT --to-ports 100",
		}
	}
	for _, c := range commands {
		if out, err := exec.Command("sh", "-c", strings.ReplaceAll(strings.ReplaceAll(c, "{", "'{"), "}", "}'")).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", c, err, out)
		}
	}
}

func TestInstallAgainAndRemove(t *testing.T) {
	forBackends(t, func(t *testing.T, backend string) {
		machines(t)
		others(t, backend)
		w := &world{t: t, backend: backend}
		if err := Remove(t.Context()); err != nil { // where there is nothing
			t.Fatal(err)
		}
		before := ruleset(t)
		w.install(rules())
		once := ruleset(t)
		if once == before {
			t.Fatal("nothing was installed")
		}
		w.install(rules())
		if again := ruleset(t); again != once {
			t.Errorf("installed again:\n%s\nwant\n%s", again, once)
		}
		small := rules()
		small.Inbound, small.UDP = nil, UDPAllow
		w.install(small)
		if err := Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		if backend == IPTables {
			// Its tables stay, as any use of them leaves them.
			if before, after := withoutEmpty(before), withoutEmpty(ruleset(t)); before != after {
				t.Errorf("after the removal:\n%s\nwant\n%s", after, before)
			}
		} else if after := ruleset(t); after != before {
			t.Errorf("after the removal:\n%s\nwant\n%s", after, before)
		}
	})
}

// withoutEmpty is a ruleset without what holds nothing: the kernel's own chains, which
// iptables makes when it first uses a table.
func withoutEmpty(ruleset string) string {
	var kept []string
	for line := range strings.Lines(ruleset) {
		if strings.HasPrefix(line, "-A ") || strings.Contains(line, "MERLON") || strings.Contains(line, "merlon") {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "")
}

// What is in force never has a gap while other rules take its place.
func TestNothingGoesPastWhileRulesAreReplaced(t *testing.T) {
	forBackends(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend)
		w.install(rules())
		ctx, cancel := context.WithCancel(t.Context())
		replaced := make(chan error, 1)
		var times atomic.Uint32
		go func() {
			for ctx.Err() == nil {
				r := rules()
				r.ExcludeUIDs = []uint32{agentUser, 5000 + times.Add(1)}
				if _, err := Install(context.WithoutCancel(ctx), backend, r); err != nil {
					replaced <- err
					return
				}
			}
			replaced <- nil
		}()
		for calls := 0; (calls < 20 || times.Load() < 4) && !t.Failed(); calls++ {
			w.want(w.here, appUser, w.there.v4, farPort, "sidecar for 10.99.0.2:80")
			w.want(w.there, 0, w.here.v6, appPort, "callers of [fd99::1]:8080")
		}
		cancel()
		if err := <-replaced; err != nil {
			t.Error(err)
		}
	})
}

func TestCheck(t *testing.T) {
	forBackends(t, func(t *testing.T, backend string) {
		machines(t)
		w := &world{t: t, backend: backend}
		missing := func(r Rules) []string {
			t.Helper()
			sentences, err := Check(t.Context(), Auto, r)
			if err != nil {
				t.Fatal(err)
			}
			return sentences
		}
		if got := missing(rules()); len(got) == 0 {
			t.Error("nothing is missing where nothing is installed")
		}
		w.install(rules())
		installed := ruleset(t)
		if got := missing(rules()); len(got) != 0 {
			t.Errorf("missing: %q; want nothing", got)
		}
		if after := ruleset(t); withoutEmpty(after) != withoutEmpty(installed) {
			t.Errorf("the check changed something:\n%s\nwant\n%s", after, installed)
		}
		for name, change := range map[string]func(*Rules){
			"another port":    func(r *Rules) { r.OutboundPort++ },
			"another user":    func(r *Rules) { r.SidecarUID++ },
			"a port more":     func(r *Rules) { r.Inbound = append(r.Inbound, Inbound{9, 10}) },
			"nothing inbound": func(r *Rules) { r.Inbound = nil },
			"UDP":             func(r *Rules) { r.UDP = UDPDrop },
			"a network":       func(r *Rules) { r.ExcludeNets = r.ExcludeNets[1:] },
			"an app's user":   func(r *Rules) { r.AppUIDs = []uint32{appUser} },
		} {
			r := rules()
			change(&r)
			if got := missing(r); len(got) == 0 {
				t.Errorf("%s: nothing is missing", name)
			}
		}
		for command, want := range map[string][]string{
			NFTables: {"nft flush chain inet merlon_capture nat_output", "lacks: meta skuid != { 1001, 4242 } meta l4proto tcp redirect to :15001"},
			IPTables: {"ip6tables -t nat -D OUTPUT -j MERLON_OUTPUT", "IPv6, table nat: chain OUTPUT does not begin with a jump to MERLON_OUTPUT"},
		} {
			if command != backend {
				continue
			}
			if out, err := exec.Command("sh", "-c", want[0]).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if got := missing(rules()); !slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, want[1]) }) {
				t.Errorf("after %s: %q; want a sentence with %q", want[0], got, want[1])
			}
		}
		if backend == NFTables {
			w.install(rules())
			if out, err := exec.Command("nft", "add table inet merlon_capture { flags dormant; }").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if got := missing(rules()); !slices.Contains(got, "the table is dormant") {
				t.Errorf("of a table that was put to sleep: %q", got)
			}
		}
	})
}

// Of two backends one is in use.
func TestTheOtherBackendsRulesGo(t *testing.T) {
	if !inside(t, slices.Concat(backends[NFTables], backends[IPTables])...) {
		return
	}
	machines(t)
	(&world{t: t, backend: IPTables}).install(rules())
	(&world{t: t, backend: NFTables}).install(rules())
	if text := ruleset(t); strings.Contains(text, "MERLON_") || !strings.Contains(text, nftTable) {
		t.Errorf("after nftables there is\n%s", text)
	}
	(&world{t: t, backend: IPTables}).install(rules())
	if text := ruleset(t); !strings.Contains(text, "MERLON_") || strings.Contains(text, nftTable) {
		t.Errorf("after iptables there is\n%s", text)
	}
	if missing, err := Check(t.Context(), Auto, rules()); len(missing) != 0 || err != nil {
		t.Errorf("Check() = %q, %v", missing, err)
	}
	if err := Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if text := withoutEmpty(ruleset(t)); text != "" {
		t.Errorf("after the removal there is\n%s", text)
	}
}

func TestValidate(t *testing.T) {
	for field, change := range map[string]func(*Rules){
		"":              func(*Rules) {},
		"outbound-port": func(r *Rules) { r.OutboundPort = 0 },
		"sidecar-user":  func(r *Rules) { r.SidecarUID = 0 },
		"app-user":      func(r *Rules) { r.AppUIDs = []uint32{sidecarUser} },
		"udp":           func(r *Rules) { r.UDP = "" },
		"inbound":       func(r *Rules) { r.Inbound = []Inbound{{80, 8443}, {80, 8444}} },
		"exclude-net":   func(r *Rules) { r.ExcludeNets = []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")} },
	} {
		r := rules()
		change(&r)
		err := r.Validate()
		invalid, ok := errors.AsType[*InvalidError](err)
		if ok != (field != "") || ok && invalid.Field != field {
			t.Errorf("%q: %v", field, err)
		}
	}
	if err := (Rules{}).Validate(); err == nil {
		t.Error("no rules are valid")
	}
	for _, in := range []Inbound{{0, 1}, {1, 0}, {1, 1}, {outboundPort, 1}, {1, outboundPort}, {inboundPort, 9}} {
		r := rules()
		r.Inbound = append(r.Inbound, in)
		if r.Validate() == nil {
			t.Errorf("inbound %v is valid", in)
		}
	}
}

// Whatever the rules are, no backend captures the sidecar, and both do as much.
func TestTheSidecarIsNeverCaptured(t *testing.T) {
	uids := rapid.SliceOfN(rapid.Uint32Range(1, 5), 0, 3)
	rapid.Check(t, func(t *rapid.T) {
		r := Rules{
			SidecarUID: rapid.Uint32Range(1, 5).Draw(t, "sidecar"), OutboundPort: outboundPort, UDP: rapid.SampledFrom([]UDP{UDPAllow, UDPDNS, UDPDrop}).Draw(t, "udp"),
			AppUIDs: uids.Draw(t, "apps"), ExcludeUIDs: uids.Draw(t, "excluded"),
		}
		if r.Validate() != nil {
			return
		}
		if len(r.AppUIDs) == 0 != slices.Contains(r.passing(), r.SidecarUID) && len(r.AppUIDs) == 0 {
			t.Fatalf("%v pass", r.passing())
		}
		nft := r.nft(nftTable, false)
		rules := r.iptables(false)
		if strings.Contains(nft, "udp drop") != (r.UDP != UDPAllow) || (len(rules[iptChains[1]]) > 0) != (r.UDP != UDPAllow) {
			t.Fatalf("of UDP:\n%s\n%v", nft, rules)
		}
	})
}
