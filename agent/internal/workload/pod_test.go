// A process in a pod, by its control group and the kubelet.

package workload

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/agent/internal/kubelet"
)

const webPod = "7f2a3c1e-5b64-4d0e-9a37-2f8f5f3a9c10"

var podGroup = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7f2a3c1e_5b64_4d0e_9a37_2f8f5f3a9c10.slice/cri-containerd-" + id1 + ".scope"

// askKubelet lets a ask a kubelet that answers status and body.
func askKubelet(t *testing.T, a *Attestor, status int, body string) (requests *atomic.Int32) {
	t.Helper()
	requests = new(atomic.Int32)
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		requests.Add(1)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}))
	t.Cleanup(s.Close)
	dir := t.TempDir()
	token, ca := filepath.Join(dir, "token"), filepath.Join(dir, "ca.crt")
	if err := errors.Join(os.WriteFile(token, []byte("x"), 0o600),
		os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600)); err != nil {
		t.Fatal(err)
	}
	client, err := kubelet.New(kubelet.Config{
		Address: strings.TrimPrefix(s.URL, "https://"), TokenFile: token, CAFile: ca, Patience: 20 * time.Millisecond,
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	a.Kubelet = client
	return requests
}

func listOf(uid, container string) string {
	return fmt.Sprintf(`{"kind":"PodList","items":[{"metadata":{"uid":%q,"namespace":"shop"},"status":{"containerStatuses":[{"name":"web","containerID":"containerd://%s"}]}}]}`, uid, container)
}

func TestPodOfAProcess(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("control groups need root")
	}
	p := startPeer(t, self(t))
	group(t, "cgroup2", "", podGroup, p.cmd.Process.Pid)
	t.Cleanup(p.end) // before its group goes
	byKubelet := []string{"k8s:container-name:web", "k8s:ns:shop"}
	for name, tt := range map[string]struct {
		status int // 0: no kubelet
		body   string
		want   []string
		read   Kinds
	}{
		"listed":                     {200, listOf(webPod, id1), byKubelet, ControlGroups | Pods},
		"in another pod":             {200, listOf("c0ffee00-1234-4abc-8def-000000000001", id1), nil, ControlGroups | Pods},
		"another container":          {200, listOf(webPod, id2), nil, ControlGroups | Pods},
		"no pods":                    {200, `{"kind":"PodList"}`, nil, ControlGroups | Pods},
		"the kubelet is away":        {503, "", nil, ControlGroups},
		"the kubelet says something": {200, "hello", nil, ControlGroups},
		"no kubelet":                 {0, "", nil, ControlGroups | Pods},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAttestor(t)
			if tt.status != 0 {
				askKubelet(t, a, tt.status, tt.body)
			}
			got, err := a.Attest(t.Context(), p.peer, ControlGroups|Pods)
			if err != nil {
				t.Fatal(err)
			}
			s := slices.DeleteFunc(got.Selectors(), func(s string) bool { return KindOf(s) != Pods })
			if !slices.Equal(s, tt.want) || got.Read != tt.read {
				t.Errorf("selectors %q, read %b; want %q, %b", s, got.Read, tt.want, tt.read)
			}
			if !slices.Contains(got.Selectors(), "k8s:pod-uid:"+webPod) {
				t.Errorf("selectors %q lack the pod's UID, which the control group has", got.Selectors())
			}
			if tt.want == nil && len(got.Notes) == 0 {
				t.Error("no note says why the pod's selectors are missing")
			}
		})
	}
}

// The kubelet is asked only where some entry asks for a pod, and for processes
// in one.
func TestKubeletIsAskedForPodsOnly(t *testing.T) {
	a, p := newAttestor(t), startPeer(t, self(t))
	requests := askKubelet(t, a, 200, listOf(webPod, id1))
	if _, err := a.Attest(t.Context(), p.peer, AllKinds); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		group(t, "cgroup2", "", podGroup, p.cmd.Process.Pid)
		t.Cleanup(p.end)
		if _, err := a.Attest(t.Context(), p.peer, AllKinds&^Pods); err != nil {
			t.Fatal(err)
		}
	}
	if got := requests.Load(); got != 0 {
		t.Errorf("%d requests; want none", got)
	}
}
