// Where the CA is: one address, or one for each of its replicas.

package agent

import (
	"fmt"
	"net"
	"strconv"
	"strings"
)

// maxAddresses bounds how long an agent looks for its CA before it begins
// again.
const maxAddresses = 16

// Addresses are the places of one CA, each "host:port". In a file they are
// one string or a list of strings, in flags and environment separated by
// commas.
type Addresses []string

// UnmarshalText reads addresses that are separated by commas.
func (a *Addresses) UnmarshalText(text []byte) error {
	*a = nil
	for part := range strings.SplitSeq(string(text), ",") {
		*a = append(*a, strings.TrimSpace(part))
	}
	return nil
}

// String separates the addresses by commas, for people.
func (a Addresses) String() string { return strings.Join(a, ", ") }

// onPort returns the same hosts with another port.
func (a Addresses) onPort(port string) Addresses {
	out := make(Addresses, 0, len(a))
	for _, address := range a {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return nil // Validate says what is wrong with it
		}
		out = append(out, net.JoinHostPort(host, port))
	}
	return out
}

// check says what is wrong with the addresses of field.
func (a Addresses) check(field string) error {
	if len(a) > maxAddresses {
		return &InvalidError{Field: field, Reason: fmt.Sprintf("has %d addresses, at most %d are taken", len(a), maxAddresses)}
	}
	seen := make(map[string]bool, len(a))
	for _, address := range a {
		if err := checkAddress(field, address); err != nil {
			return err
		}
		if seen[address] {
			return &InvalidError{
				Field: field, Reason: fmt.Sprintf("%q stands there twice", address),
				Hint: "replicas on one host have ports of their own: name ca_https_address too",
			}
		}
		seen[address] = true
	}
	return nil
}

// checkAddresses looks at where the CA is: each replica has both ports.
func (c Config) checkAddresses() error {
	if err := c.CAAddress.check("ca_address"); err != nil {
		return err
	}
	// Replicas on one host may stand behind one HTTPS port.
	if len(c.CAHTTPSAddress) == 1 {
		return checkAddress("ca_https_address", c.CAHTTPSAddress[0])
	}
	if err := c.CAHTTPSAddress.check("ca_https_address"); err != nil {
		return err
	}
	if len(c.CAHTTPSAddress) != len(c.CAAddress) {
		return &InvalidError{
			Field: "ca_https_address", Reason: fmt.Sprintf("has %d addresses and ca_address has %d", len(c.CAHTTPSAddress), len(c.CAAddress)),
			Hint: "name the HTTPS port of each address of ca_address in the same order, or one for all, or none: port 8444 of the same hosts",
		}
	}
	return nil
}

func checkAddress(field, value string) error {
	if field == "health_address" && value == healthOff {
		return nil
	}
	host, port, err := net.SplitHostPort(value)
	if err != nil || host == "" || port == "" {
		return &InvalidError{Field: field, Reason: fmt.Sprintf("%q is not host:port", value)}
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return &InvalidError{Field: field, Reason: fmt.Sprintf("%q: the port is not a number between 0 and 65535", value)}
	}
	return nil
}
