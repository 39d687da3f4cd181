package stage

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// A program that is built with the profiler writes CPU and heap when it is told to, and
// one that nobody asked for profiles does not have it.
func TestProgramsWriteProfiles(t *testing.T) {
	src, profiles := t.TempDir(), t.TempDir()
	for name, text := range map[string]string{
		"go.mod":      "module merlon.test\n\ngo 1.26\n",
		"main.go":     "package main\n\nimport (\n\t\"io\"\n\t\"os\"\n)\n\nfunc main() { io.Copy(io.Discard, os.Stdin) }\n",
		"profiler.go": string(profiler),
	} {
		if err := os.WriteFile(filepath.Join(src, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	bin := filepath.Join(src, "merlon-ca")
	if out, err := exec.Command("go", "build", "-C", src, "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Setenv(profilesEnv, profiles)
	cmd := exec.Command(bin)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	started := func() error {
		names, _ := filepath.Glob(filepath.Join(profiles, "merlon-ca-*.cpu"))
		if len(names) != 1 {
			return os.ErrNotExist
		}
		return nil
	}
	Eventually(t, "the profile is begun", started)
	endProfile(t, "merlon-ca", cmd.Process)
	stdin.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	for _, kind := range []string{"cpu", "heap"} {
		names, err := filepath.Glob(filepath.Join(profiles, "merlon-ca-*."+kind))
		if err != nil || len(names) != 1 {
			t.Fatalf("%s profiles: %v, %v; want one", kind, names, err)
		}
		if out, err := exec.Command("go", "tool", "pprof", "-top", names[0]).CombinedOutput(); err != nil {
			t.Errorf("pprof of %s: %v\n%s", names[0], err, out)
		}
	}
	t.Setenv(profilesEnv, "")
	if args, err := profilerOverlay(src, t.TempDir()); args != nil || err != nil {
		t.Errorf("without %s programs are built with %v, %v", profilesEnv, args, err)
	}
}
