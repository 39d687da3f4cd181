// Control groups as they are found on machines, as somebody might craft them,
// and real ones.

package workload

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

var (
	id1 = strings.Repeat("1f", 32)
	id2 = strings.Repeat("2e", 32)
)

const podUID = "0195b7a2-5c1e-7c55-8d0e-0123456789ab"

func TestUnitAndContainer(t *testing.T) {
	under := strings.ReplaceAll(podUID, "-", "_")
	tests := map[string]struct {
		in        string
		unit      string
		container Container
		fails     bool // the container is ambiguous
	}{
		"no group":        {in: "0::/\n"},
		"a service":       {in: "0::/system.slice/nginx.service\n", unit: "nginx.service"},
		"a nested slice":  {in: "0::/shop.slice/shop-web.slice/web@1.service\n", unit: "web@1.service"},
		"below a service": {in: "0::/system.slice/postgresql.service/worker.service\n", unit: "postgresql.service"},
		"a user's unit":   {in: "0::/user.slice/user-1000.slice/user@1000.service/app.slice/web.service\n", unit: "user@1000.service"},
		"a session":       {in: "0::/user.slice/user-1000.slice/session-3.scope\n", unit: "session-3.scope"},
		"escaped":         {in: "0::/system.slice/_cpu.service\n", unit: "cpu.service"},
		"hybrid":          {in: "1:name=systemd:/system.slice/a.service\n0::/system.slice/b.service\n", unit: "a.service"},
		"another namespace": {
			in: "0::/../../nginx.service\n", fails: true,
		},
		"deleted":   {in: "0::/system.slice/nginx.service (deleted)\n", fails: true},
		"not units": {in: "0::/mine/nginx.service\n"},

		"docker by systemd": {
			in: "0::/system.slice/docker-" + id1 + ".scope\n", unit: "docker-" + id1 + ".scope",
			container: Container{ID: id1, Runtime: "docker"},
		},
		"docker, version 1": {
			in:        "12:pids:/docker/" + id1 + "\n11:cpu:/docker/" + id1 + "\n1:name=systemd:/docker/" + id1 + "\n0::/system.slice/containerd.service\n",
			container: Container{ID: id1, Runtime: "docker"},
		},
		"podman": {
			in: "0::/machine.slice/libpod-" + id1 + ".scope/container\n", unit: "libpod-" + id1 + ".scope",
			container: Container{ID: id1, Runtime: "podman"},
		},
		"podman by itself": {in: "0::/libpod_parent/libpod-" + id1 + "\n", container: Container{ID: id1, Runtime: "podman"}},
		"nerdctl":          {in: "0::/system.slice/nerdctl-" + id1 + ".scope\n", unit: "nerdctl-" + id1 + ".scope", container: Container{ID: id1, Runtime: "containerd"}},
		"its monitor":      {in: "0::/machine.slice/libpod-conmon-" + id1 + ".scope\n", unit: "libpod-conmon-" + id1 + ".scope"},
		"a user's podman": {
			in: "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id1 + ".scope\n", unit: "user@1000.service",
		},
		"a service's own group": {in: "0::/system.slice/ci.service/docker-" + id1 + ".scope\n", unit: "ci.service"},
		"docker in docker":      {in: "0::/docker/" + id1 + "/docker/" + id2 + "\n", fails: true},
		"a scope in a scope":    {in: "0::/system.slice/docker-" + id1 + ".scope/x/" + id2 + "\n", unit: "docker-" + id1 + ".scope", fails: true},
		"two containers":        {in: "3:pids:/docker/" + id1 + "\n2:cpu:/docker/" + id2 + "\n", fails: true},
		"a user's own group":    {in: "0::/user.slice/docker-" + id1 + ".scope\n", unit: "docker-" + id1 + ".scope"},
		"a user's own slice":    {in: "0::/user.slice/user-1000.slice/cri-containerd-" + id1 + ".scope\n", unit: "cri-containerd-" + id1 + ".scope"},
		"a short ID":            {in: "0::/docker/" + id1[:12] + "\n"},

		"burstable by systemd": {
			in:        "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/cri-containerd-" + id1 + ".scope\n",
			unit:      "cri-containerd-" + id1 + ".scope",
			container: Container{ID: id1, Runtime: "containerd", PodUID: podUID, QoS: "burstable"},
		},
		"guaranteed by systemd": {
			in:        "0::/kubepods.slice/kubepods-pod" + under + ".slice/crio-" + id1 + ".scope\n",
			unit:      "crio-" + id1 + ".scope",
			container: Container{ID: id1, Runtime: "cri-o", PodUID: podUID, QoS: "guaranteed"},
		},
		"best effort, version 1": {
			in:        "4:memory:/kubepods/besteffort/pod" + podUID + "/" + id1 + "\n",
			container: Container{ID: id1, PodUID: podUID, QoS: "besteffort"},
		},
		"a pod from a file": {
			in:        "0::/kubepods/burstable/pod" + id1[:32] + "/" + id1 + "\n",
			container: Container{ID: id1, PodUID: id1[:32], QoS: "burstable"},
		},
		"below a group of the kubelet": {
			in:        "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + under + ".slice/cri-containerd-" + id1 + ".scope\n",
			unit:      "cri-containerd-" + id1 + ".scope",
			container: Container{ID: id1, Runtime: "containerd", PodUID: podUID, QoS: "besteffort"},
		},
		"the pod's own group":     {in: "0::/kubepods/pod" + podUID + "\n", container: Container{PodUID: podUID, QoS: "guaranteed"}},
		"no pod":                  {in: "0::/kubepods/burstable\n"},
		"a pod in a container":    {in: "0::/docker/" + id1 + "/kubepods/pod" + podUID + "/" + id2 + "\n", fails: true},
		"no pod's name":           {in: "0::/kubepods/burstable/podrunner/" + id1 + "\n", fails: true},
		"no container's name":     {in: "0::/kubepods/burstable/pod" + podUID + "/web\n", fails: true},
		"a slice of another name": {in: "0::/kubepods.slice/other-pod" + under + ".slice/crio-" + id1 + ".scope\n", unit: "crio-" + id1 + ".scope", fails: true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			groups := parseCgroup([]byte(tt.in))
			if unit, _ := groups.unit(); unit != tt.unit {
				t.Errorf("unit() = %q; want %q", unit, tt.unit)
			}
			got, err := groups.container()
			if got != tt.container || (err != nil) != tt.fails {
				t.Errorf("container() = %+v, %v; want %+v, failure %v", got, err, tt.container, tt.fails)
			}
		})
	}
}

// Whatever a user or a container does below the group that it was given, it
// becomes nothing that it was not.
func TestNamesBelowAGroupProveNothing(t *testing.T) {
	part := rapid.OneOf(
		rapid.SampledFrom([]string{
			"kubepods", "kubepods.slice", "docker", "libpod_parent", "default", "system.slice", "nginx.service", "..", "pod" + podUID,
			"docker-" + id2 + ".scope", "cri-containerd-" + id2 + ".scope", id2, "init.scope", "user.slice",
		}),
		rapid.StringMatching(`[a-z0-9.:_-]{1,20}`),
	)
	rapid.Check(t, func(t *rapid.T) {
		below := strings.Join(rapid.SliceOfN(part, 1, 6).Draw(t, "below"), "/")
		for outer, want := range map[string]struct {
			unit      string
			container Container
		}{
			"/user.slice/user-1000.slice/user@1000.service": {"user@1000.service", Container{}},
			"/system.slice/ci.service":                      {"ci.service", Container{}},
			"/system.slice/docker-" + id1 + ".scope":        {"docker-" + id1 + ".scope", Container{ID: id1, Runtime: "docker"}},
		} {
			groups := parseCgroup([]byte("0::" + outer + "/" + below + "\n"))
			if unit, err := groups.unit(); err == nil && unit != want.unit {
				t.Fatalf("unit() of %q = %q; want %q", groups, unit, want.unit)
			}
			if c, err := groups.container(); err == nil && c != want.container {
				t.Fatalf("container() of %q = %+v; want %+v", groups, c, want.container)
			}
		}
	})
}

func FuzzParseCgroup(f *testing.F) {
	f.Add([]byte("0::/system.slice/docker-" + id1 + ".scope\n1:name=systemd:/a.service\n"))
	f.Add([]byte("0::/kubepods/besteffort/pod" + podUID + "/" + id1 + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		groups := parseCgroup(b)
		if unit, err := groups.unit(); unit != "" && (err != nil || !unitName.MatchString(unit)) {
			t.Errorf("unit() = %q, %v", unit, err)
		}
		c, err := groups.container()
		if err != nil && c != (Container{}) || c.ID != "" && !bareID.MatchString(c.ID) || c.PodUID != "" && !podName.MatchString("pod"+c.PodUID) {
			t.Errorf("container() = %+v, %v", c, err)
		}
	})
}

// group makes a control group and moves the process into it. The hierarchies of
// this machine are mounted in a place of the test's own.
func group(t *testing.T, kind, options, name string, pid int) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("control groups need root")
	}
	root := t.TempDir()
	if err := unix.Mount("none", root, kind, 0, options); err != nil {
		t.Skipf("mount %s %s: %v", kind, options, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	})
	dir := filepath.Join(root, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for ; dir != root; dir = filepath.Dir(dir) {
			_ = os.Remove(dir) // not where another group of the machine lies below
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(pid)), 0); err != nil {
		t.Skipf("move into a group: %v", err)
	}
}

func TestRealControlGroups(t *testing.T) {
	for name, h := range map[string]struct{ kind, options, group string }{
		"version 2": {"cgroup2", "", "merlontest.slice/docker-" + id1 + ".scope"},
		"version 1": {"cgroup", "pids", "docker/" + id1},
	} {
		t.Run(name, func(t *testing.T) {
			a, p := newAttestor(t), startPeer(t, self(t))
			group(t, h.kind, h.options, h.group, p.cmd.Process.Pid)
			t.Cleanup(p.end) // before its group goes
			got, err := a.Attest(t.Context(), p.peer, ControlGroups)
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"container:id:" + id1, "container:runtime:docker"} {
				if !slices.Contains(got.Selectors(), want) {
					t.Errorf("Selectors() = %q; want %q among them", got.Selectors(), want)
				}
			}
		})
	}
}

func TestNamesOfUsersAndGroups(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "passwd")
	write := func(text string) {
		t.Helper()
		temp := path + ".new"
		if err := errors.Join(os.WriteFile(temp, []byte(text), 0o600), os.Rename(temp, path)); err != nil {
			t.Fatal(err)
		}
	}
	n := &names{path: path}
	if name, err := n.of(0); err == nil {
		t.Errorf("of(0) = %q without a file; want an error", name)
	}
	write("root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/:\nadmin:x:7:7::/:\nother:x:7:7::/:\n+nis:x:8:8::/:\nbad name:x:9:9::/:\nshort:x:10\n#x:y:11:1:\n" +
		"again:x:12:1::/:\nagain:x:12:1::/:\nlarge:x:4294967296:1::/:\n")
	for id, want := range map[uint32]string{0: "root", 33: "web", 12: "again", 7: "", 8: "", 9: "", 10: "", 11: "", 4242: ""} {
		if name, err := n.of(id); name != want || (err == nil) != (want != "") {
			t.Errorf("of(%d) = %q, %v; want %q", id, name, err, want)
		}
	}
	if _, err := n.of(4242); !errors.Is(err, errUnnamed) {
		t.Errorf("of(4242) = %v; want %v", err, errUnnamed)
	}
	write("web2:x:33:33::/:\n")
	if name, err := n.of(33); name != "web2" || err != nil {
		t.Errorf("of(33) after a change = %q, %v; want web2", name, err)
	}
}

func FuzzParseNames(f *testing.F) {
	f.Add([]byte("root:x:0:0:root:/root:/bin/sh\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for id, name := range parseNames(b) {
			if name != "" && !plainName([]byte(name)) {
				t.Errorf("%d is %q", id, name)
			}
		}
	})
}
