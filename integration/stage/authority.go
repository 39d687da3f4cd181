// The authorities of a trust domain, as `merlon authority` shows and steps them.

package stage

import (
	"errors"
	"fmt"
	"strings"
)

// Authority is an authority as `merlon authority list -o json` shows it.
type Authority struct {
	ID      string `json:"authority_id"`
	Kind    string `json:"kind"`
	State   string `json:"state"`
	Root    string `json:"root_authority_id"`
	Pending *struct {
		Agents []string `json:"agents"`
		Silent []string `json:"silent_replicas"`
		Ready  bool     `json:"ready"`
	} `json:"pending"`
}

// AuthorityIn is the authority of a kind and state, if there is one and the CA
// answers.
func AuthorityIn(d *Domain, kind, state string) (Authority, error) {
	all, err := Authorities(d)
	if err != nil {
		return Authority{}, err
	}
	for _, a := range all {
		if a.Kind == kind && a.State == state {
			return a, nil
		}
	}
	return Authority{}, fmt.Errorf("no %s is %s in %+v", kind, state, all)
}

// Authorities are all that there are.
func Authorities(d *Domain) (all []Authority, err error) {
	stdout, stderr, err := d.Try("authority", "list", "-o", "json")
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, stderr)
	}
	Decode(d.TB, stdout, &all)
	return all, nil
}

// Done repeats a command until it succeeds: it waits, or the CA is away.
func Done(d *Domain, args ...string) {
	d.TB.Helper()
	Eventually(d.TB, "merlon "+strings.Join(args, " "), func() error {
		_, stderr, err := d.Try(args...)
		if err != nil {
			return errors.New(stderr)
		}
		return nil
	})
}

// RotateRoot takes a new root through all its states, and the one before out.
// between is called between the steps.
func RotateRoot(d *Domain, between func()) {
	d.TB.Helper()
	before, err := AuthorityIn(d, "x509-root", "active")
	if err != nil {
		d.TB.Fatal(err)
	}
	d.Merlon("authority", "prepare", "--kind", "x509-root")
	between()
	var next Authority
	Eventually(d.TB, "the new root is published", func() (err error) {
		next, err = AuthorityIn(d, "x509-root", "published")
		return err
	})
	Done(d, "authority", "activate", next.ID)
	between()
	Eventually(d.TB, "every replica signs under the new root", func() error {
		all, err := Authorities(d)
		for _, a := range all {
			if a.Kind == "x509-intermediate" && a.State == "active" && a.Root != next.ID {
				err = fmt.Errorf("an intermediate is under %s, not %s", a.Root, next.ID)
			}
		}
		return err
	})
	Done(d, "authority", "taint", before.ID)
	between()
	Done(d, "authority", "revoke", before.ID)
}
