// SIGKILL of whatever a call by two sidecars needs, in any order and several at once: it
// recovers, and never fails open. `make kills` goes on for longer.

package sidecars_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
)

// mortal is a process that can be killed and started again.
type mortal interface {
	Kill()
	Restart()
}

// program is one that is not ours.
type program struct {
	t    *testing.T
	args []string
	cmd  *exec.Cmd
}

func startProgram(t *testing.T, args ...string) *program {
	p := &program{t: t, args: args}
	p.Restart()
	t.Cleanup(p.Kill)
	return p
}

func (p *program) Kill() {
	if p.cmd != nil {
		p.cmd.Process.Kill()
		p.cmd.Wait()
	}
	p.cmd = nil
}

func (p *program) Restart() {
	p.Kill()
	p.cmd = exec.Command(p.args[0], p.args[1:]...)
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
}

// numberFrom is a number from the environment.
func numberFrom[N int | uint64](t *testing.T, name string, otherwise N) N {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 63)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return N(n)
}

func TestSidecarsRecoverFromKillsInAnyOrder(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("nginx"); err != nil {
		t.Skip("needs nginx: apt-get install nginx-light")
	}
	seed := numberFrom(t, "MERLON_SEED", rand.Uint64()>>1)
	rounds := numberFrom(t, "MERLON_KILLS", 3)
	t.Logf("MERLON_SEED=%d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	dir := stage.Dir(t)
	d := stage.Separate(t)
	d.Merlon("entry", "create", "--parent", d.AgentID(), "--spiffe-id", d.ID("/shop"), "--selector", "unix:path:"+stage.Bin(t, "merlon-sidecar"))
	grants := fmt.Sprintf("grants:\n  - {id: shop, from: [%[1]s], to: [%[1]s], http: {paths: [/open]}}\n", d.ID("/shop"))
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(grants), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", dir)
	app := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	config := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, `daemon off; master_process off; pid %[1]s/pid; error_log %[1]s/err; events {}
http { access_log off; client_body_temp_path %[1]s/1; proxy_temp_path %[1]s/2; fastcgi_temp_path %[1]s/3; uwsgi_temp_path %[1]s/4; scgi_temp_path %[1]s/5;
server { listen %[2]s; location / { return 200 served; } } }`, dir, app), 0o600); err != nil {
		t.Fatal(err)
	}
	tap := stage.NewTap(t, app)
	inbound, outbound := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)), fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	env := []string{"SPIFFE_ENDPOINT_SOCKET=" + d.WorkloadAPI}
	mortals := []struct {
		name string
		mortal
	}{
		{"CA", d.CA},
		{"agent", d.Agent},
		{"app", startProgram(t, "nginx", "-c", config, "-e", filepath.Join(dir, "err"))},
		{"inbound sidecar", stage.Start(t, "merlon-sidecar", env, "-health-address", "off", "-inbound", inbound+","+tap.Address+",http")},
		{"outbound sidecar", stage.Start(t, "merlon-sidecar", env, "-health-address", "off", "-outbound", outbound+",shop,http,"+inbound)},
	}
	open := func() error { return services.Wants("http://"+outbound+"/open", "200 served") }
	stage.Eventually(t, "an answer", open)

	// All the time somebody tries what no grant allows: denied, or no answer while a process
	// that it needs is dead.
	var tries, denied atomic.Int64
	stop := make(chan struct{})
	var trying sync.WaitGroup
	trying.Go(func() {
		for pace := time.NewTicker(20 * time.Millisecond); ; {
			select {
			case <-stop:
				pace.Stop()
				return
			case <-pace.C:
			}
			got, err := services.Get("http://" + outbound + "/closed")
			tries.Add(1)
			switch {
			case err == nil && strings.HasPrefix(got, "200"):
				t.Errorf("a call that no grant allows: %s", got)
			case err == nil && strings.HasPrefix(got, "403"):
				denied.Add(1)
			}
		}
	})
	defer func() { close(stop); trying.Wait() }()

	for round := range rounds {
		var order []string
		killed := random.Perm(len(mortals))[:1+random.IntN(len(mortals))]
		for _, i := range killed {
			order = append(order, mortals[i].name)
			mortals[i].Kill()
		}
		order = append(order, "back:")
		random.Shuffle(len(killed), func(i, j int) { killed[i], killed[j] = killed[j], killed[i] })
		for _, i := range killed {
			order = append(order, mortals[i].name)
			mortals[i].Restart()
		}
		t.Logf("round %d: %s", round, strings.Join(order, ", "))
		if err := back(time.Minute, open); err != nil {
			t.Fatalf("no answer within a minute after round %d: %v", round, err)
		}
		before := denied.Load()
		if err := back(time.Minute, func() error {
			if denied.Load() == before {
				return errors.New("what no grant allows is not denied")
			}
			return nil
		}); err != nil {
			t.Fatalf("within a minute after round %d: %v", round, err)
		}
	}
	t.Logf("%d calls that no grant allows, %d of them denied by the policy, the others failed", tries.Load(), denied.Load())
	for _, r := range heardHTTP1(t, tap) {
		if r.RequestURI != "/open" {
			t.Errorf("the app heard %s %s", r.Method, r.RequestURI)
		}
	}
}

// back waits for limit at most until check has nothing to say.
func back(limit time.Duration, check func() error) (err error) {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = check(); err == nil {
			return nil
		}
	}
	return err
}
