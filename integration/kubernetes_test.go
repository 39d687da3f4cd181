// A container of a pod, seen from outside: a real control group, a kubelet over
// TLS that serves what one serves, the real agent.

package integration_test

import (
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"merlon.dev/integration/stage"
)

// web is the container of the fixture that the tests are in.
const web = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7f2a3c1e_5b64_4d0e_9a37_2f8f5f3a9c10.slice/" +
	"cri-containerd-3333333333333333333333333333333333333333333333333333333333333333.scope"

// moveInto puts a process into a control group of this machine.
func moveInto(t *testing.T, name string, pid int) {
	t.Helper()
	root := stage.Dir(t)
	if err := syscall.Mount("none", root, "cgroup2", 0, ""); err != nil {
		t.Skipf("mount control groups: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(root, 0) })
	dir := filepath.Join(root, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Skipf("make a control group: %v", err)
	}
	t.Cleanup(func() {
		for ; dir != root; dir = filepath.Dir(dir) {
			_ = os.Remove(dir) // not where another group of the machine lies below
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Skipf("move into a control group: %v", err)
	}
}

// startKubelet serves the pods of the kubelet's fixture, but no pods at first, and
// tells agents that start where.
func startKubelet(t *testing.T, late int32) (requests *atomic.Int32) {
	t.Helper()
	pods, err := os.ReadFile("../agent/internal/kubelet/testdata/pods.json")
	if err != nil {
		t.Fatal(err)
	}
	requests = new(atomic.Int32)
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := requests.Add(1)
		switch {
		case r.URL.Path != "/pods" || r.Header.Get("Authorization") != "Bearer token-of-the-agent":
			w.WriteHeader(http.StatusForbidden)
		case n > late:
			_, _ = w.Write(pods)
		default:
			_, _ = w.Write([]byte(`{"kind":"PodList","apiVersion":"v1","metadata":{},"items":null}`))
		}
	}))
	t.Cleanup(s.Close)
	dir := stage.Dir(t)
	write := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	t.Setenv("MERLON_AGENT_KUBELET_ADDRESS", strings.TrimPrefix(s.URL, "https://"))
	t.Setenv("MERLON_AGENT_KUBELET_TOKEN_FILE", write("token", []byte("token-of-the-agent")))
	t.Setenv("MERLON_AGENT_KUBELET_CA_FILE", write("ca.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	return requests
}

func TestPodGetsTheIdentityOfItsServiceAccount(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("control groups need root")
	}
	requests := startKubelet(t, 2) // it lists a container some time after it runs
	d := stage.Separate(t)
	inside, outside := startWorkload(t, d, 0), startWorkload(t, d, 0)
	moveInto(t, web, inside.cmd.Process.Pid)
	t.Cleanup(inside.end) // before its group goes

	register(t, d, "/by-uid", byUser(0))
	inside.want("open", "svids /by-uid")
	outside.want("open", "svids /by-uid")
	if got := requests.Load(); got != 0 {
		t.Errorf("the kubelet was asked %d times where no entry asks for a pod", got)
	}
	register(t, d, "/metrics", "k8s:ns:shop", "k8s:container-name:metrics")
	register(t, d, "/elsewhere", "k8s:ns:kube-system")
	register(t, d, "/shop/web", "k8s:ns:shop", "k8s:sa:web", "k8s:container-name:web", "k8s:pod-label:app.kubernetes.io/name:web",
		"k8s:pod-owner:ReplicaSet:web-5d9c7b9f6d", "k8s:container-image:registry.example.org/shop/web:1.4.2")
	inside.want("next", "svids /by-uid /shop/web")
	if got := requests.Load(); got < 3 {
		t.Errorf("%d requests; want the agent to ask again for what is not listed yet", got)
	}
	startWorkload(t, d, 0).want("open", "svids /by-uid")
	for _, line := range []string{"k8s:ns:shop", "k8s:pod-uid:7f2a3c1e-5b64-4d0e-9a37-2f8f5f3a9c10", "k8s:container-name:web"} {
		if out := d.Explain("identity", "--pid", strconv.Itoa(inside.cmd.Process.Pid)); !strings.Contains(out, line) {
			t.Errorf("explain does not show %s:\n%s", line, out)
		}
	}
}
