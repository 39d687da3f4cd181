// What operators can and cannot do to authorities, and what is on record of them
// from the first start on.

package ca_test

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"merlon.dev/ca/capb"
)

func TestFirstKeysAreRecorded(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	first := map[string]string{
		"begin with root":         c.authority(rootKind, "active", "").GetAuthorityId(),
		"begin with intermediate": c.authority("x509-intermediate", "active", "ca").GetAuthorityId(),
		"begin with JWT key":      c.authority(jwtKind, "active", "ca").GetAuthorityId(),
	}
	check := func() {
		t.Helper()
		for detail, id := range first {
			if n := c.recordsOf(id, "admin", detail); n != 1 {
				t.Errorf("%d records %q of %s; want 1", n, detail, id)
			}
		}
	}
	check()
	c.stop()
	c = startCA(t, dir)
	check()
}

func TestPreparingIsBounded(t *testing.T) {
	c := startCA(t, tempDir(t))
	for range 4 {
		c.prepare(rootKind)
	}
	_, err := c.admin.PrepareAuthority(t.Context(), &capb.PrepareAuthorityRequest{Kind: rootKind})
	wantCode(t, err, codes.FailedPrecondition)
	if err == nil || !strings.Contains(err.Error(), "activate one of them, or revoke") {
		t.Errorf("prepare: %v; want it to say what to do", err)
	}
	if made := glob(t, c.dir, "root-*"); len(made) != 5 {
		t.Errorf("keys of roots = %v; want the one that signs and four", made)
	}
}

// What takes no steps says so, and which step of what was asked for.
func TestIntermediateTakesNoSteps(t *testing.T) {
	c := startCA(t, tempDir(t))
	id := c.authority("x509-intermediate", "active", "ca").GetAuthorityId()
	taint := func(id string) error {
		_, err := c.admin.TaintAuthority(t.Context(), &capb.TaintAuthorityRequest{AuthorityId: id})
		return err
	}
	for name, step := range map[string]func(id string) error{
		"activate": func(id string) error { return c.activate(id, true) },
		"revoke":   func(id string) error { return c.revoke(id, true) },
		"taint":    taint,
	} {
		err := step(id)
		wantCode(t, err, codes.FailedPrecondition)
		if want := name + " " + id + ": it is an intermediate, of replica ca"; err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "renewed by itself") {
			t.Errorf("%v; want %q, and what happens instead", err, want)
		}
		err = step("zz")
		wantCode(t, err, codes.NotFound)
		if want := name + ` "zz": no such authority`; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
		wantCode(t, step(""), codes.InvalidArgument)
	}
}
