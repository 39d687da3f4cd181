// The command line of a program, the environment, and the file that either names.

package settings

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"merlon.dev/policy/strictyaml"
)

// Program is one that reads a configuration C.
type Program[C any] struct {
	// Name is the program file's, such as merlon-agent.
	Name string
	// Env begins the environment variable of each setting: with MERLON_AGENT_ the key
	// ca_address is MERLON_AGENT_CA_ADDRESS.
	Env string
	// About is what -h says first: what the program does, and examples.
	About string
	// Settings are what it can be told, in the order of -h.
	Settings []Setting[C]
	// Flags registers further flags, which are for one start and in no file; may be nil.
	Flags func(*flag.FlagSet)
}

// Line is what a command line says beside the settings.
type Line struct {
	// ValidateOnly asks to check the settings and do nothing else.
	ValidateOnly bool
	// Args is what is behind the flags.
	Args []string
}

// Read reads the flags in args, then the environment, then the file that either
// names, into c. flag.ErrHelp means that help was asked for and printed to help.
func (p *Program[C]) Read(c *C, args []string, getenv func(string) string, help io.Writer) (Line, error) {
	var line Line
	set := flag.NewFlagSet(p.Name, flag.ContinueOnError)
	set.SetOutput(io.Discard) // the caller reports mistakes, once
	file := set.String("config", getenv(p.Env+"CONFIG"), "YAML `file` with the settings")
	set.BoolVar(&line.ValidateOnly, "validate", false, "check the settings and leave")
	if p.Flags != nil {
		p.Flags(set)
	}
	given := p.register(set)
	if err := set.Parse(args); errors.Is(err, flag.ErrHelp) {
		p.printHelp(help, set)
		return line, err
	} else if err != nil {
		return line, p.Mistake(err)
	}
	line.Args = set.Args()
	if *file != "" {
		if err := p.readFile(c, *file); err != nil {
			return line, err
		}
	}
	return line, p.apply(c, given, getenv)
}

// Mistake is err as a mistake in the command line.
func (p *Program[C]) Mistake(err error) error {
	return &UsageError{err, p.Name + " -h shows every flag and an example"}
}

// Unexpected refuses what is behind the flags.
func (p *Program[C]) Unexpected(line Line) error {
	if len(line.Args) > 0 {
		return p.Mistake(fmt.Errorf("unexpected argument %q", line.Args[0]))
	}
	return nil
}

// register adds the settings to set; what is given is in the map once it has parsed.
func (p *Program[C]) register(set *flag.FlagSet) (given map[string]string) {
	given = make(map[string]string)
	for _, s := range p.Settings {
		take := func(text string) error {
			if before, twice := given[s.Key]; twice && s.Join != "" {
				text = before + s.Join + text
			}
			given[s.Key] = text
			return nil
		}
		switch name := s.flag()[1:]; {
		case s.Secret:
		case s.Switch:
			set.BoolFunc(name, s.Usage, take)
		default:
			set.Func(name, s.Usage, take)
		}
	}
	return given
}

func (p *Program[C]) readFile(c *C, file string) error {
	data, err := strictyaml.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return &UsageError{fmt.Errorf("read the configuration: %w", err), "name the file with -config, or give the settings as flags: " + p.Name + " -h"}
	}
	if err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	*c, err = Parse[C](file, data)
	return err
}

// Parse reads YAML; name is for errors, which name the line. Unknown keys are errors.
func Parse[C any](name string, data []byte) (c C, err error) {
	if err := strictyaml.Decode(name, data, &c); err != nil {
		return c, fmt.Errorf("read the configuration: %w", err)
	}
	return c, nil
}

// apply sets what flags and environment say.
func (p *Program[C]) apply(c *C, given map[string]string, getenv func(string) string) error {
	for _, s := range p.Settings {
		source := p.Env + strings.ToUpper(s.Key)
		text := getenv(source)
		if flagged, ok := given[s.Key]; ok {
			text, source = flagged, s.flag()
		} else if text == "" {
			continue
		}
		if err := s.set(c, text); err != nil {
			return p.Mistake(fmt.Errorf("%s: %w", source, err))
		}
	}
	return nil
}

func (p *Program[C]) printHelp(w io.Writer, set *flag.FlagSet) {
	fmt.Fprintf(w, "%s\nEach setting can also come from %sNAME in the environment.\n\nFlags:\n", p.About, p.Env)
	set.SetOutput(w)
	set.PrintDefaults()
}
